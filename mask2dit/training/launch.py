"""Starts the processes of a run: `python -m mask2dit.training.launch [torchrun's options] -m mask2dit.training …`.

torchrun alone answers SIGTERM and SIGHUP by killing its processes half a minute later, in which a large model is not saved,
and ends with status 1 whatever they ended with, so that a cluster could not tell a run that was stopped from one that failed.
"""

import logging
import signal
import sys
from collections.abc import Sequence

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from mask2dit.command import PREEMPTED, stop_signals


def launch(arguments: Sequence[str]) -> int:
    """Runs torchrun and passes SIGTERM and SIGHUP on to its processes.

    Args:
        arguments: of torchrun.

    Returns:
        0, or the status of the process that failed first; as in a shell, 128 + n if signal n killed it.
    """

    def pass_on(number: int, frame: object) -> None:
        for process in psutil.Process().children():
            process.send_signal(number)

    for number in stop_signals():
        signal.signal(number, pass_on)
    # Where torchrun reports a process that failed, in red; one that saved and ended as it was told to did not.
    agent = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    agent.addFilter(lambda record: not (record.levelno == logging.ERROR and PREEMPTED in (record.args or ())))
    try:
        main(["--signals_to_handle=SIGINT,SIGQUIT", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
