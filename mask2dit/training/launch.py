"""Starts the processes of a run: `python -m mask2dit.training.launch [torchrun's options] -m mask2dit.training …`.

On SIGTERM and SIGHUP, torchrun alone kills its processes after half a minute, too soon to save a large model. It always exits
with status 1 then, so that a cluster could not distinguish a stopped run from a failed one.
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
        arguments: the arguments of torchrun.

    Returns:
        0, or the exit status of the first process that failed; as in a shell, 128 + n if signal n killed it.
    """

    def pass_on(number: int, frame: object) -> None:
        for process in psutil.Process().children():
            process.send_signal(number)

    for number in stop_signals():
        signal.signal(number, pass_on)
    # This logger reports failed processes as errors; a process that saved and stopped as requested did not fail.
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
