"""The engine that runs stages in this process, or in several processes of this machine."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mask2dit.engine.config import EngineConfig, Resources
from mask2dit.engine.share import Outcome, Pool, Process, Runner, Workers, in_batches, share

Place = tuple[tuple[str, str], ...]

_runner: Runner  # of a worker process


class LocalEngine:
    """Runs stages on this machine. Close it at the end.

    Args:
        config: the number of workers and their resources.

    Raises:
        ValueError: if a worker takes more GPUs than there are.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self._pool = Pool(LocalWorker)
        for name, resources in config.resources.items():
            if resources.num_gpus and resources.num_gpus > (count := len(_visible_gpus())):
                raise ValueError(
                    f"resources.{name}.num_gpus={resources.num_gpus:g} is more than the {count} GPUs that torch finds on "
                    "this machine"
                )

    def run(self, name: str, process: Process, items: Sequence, workers: Workers) -> Iterator:
        """Yields the results of a stage over items, in any order.

        Args:
            name: the stage's name, a key of `resources`.
            process: the stage, a generator function over items.
            items: the items.
            workers: how workers run it.
        """
        if self.config.num_workers is None:
            loaded = workers.load() if workers.load and workers.here is None else workers.here
            yield from process(items, *([loaded] if workers.load else []))
            return
        resources = self.config.resources.get(name, Resources())
        batches = in_batches(items, resources.batch or workers.batch)
        shown = _shown_gpus(self.config.num_workers, resources.num_gpus, workers.uses_gpu)
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(shown))))
        places: list[Place] = [
            (("OMP_NUM_THREADS", threads), *([] if gpus is None else [("CUDA_VISIBLE_DEVICES", gpus)]))
            for gpus in shown
        ]
        runner = pickle.dumps(Runner(process, workers.load))
        yield from share(name, batches, runner, self._pool, places)

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.stop_others()


class LocalWorker:
    """A process of this machine.

    Args:
        place: variables of its environment, which libraries read when they are imported.
    """

    lost = BrokenProcessPool

    def __init__(self, place: Place):
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self._executor = ProcessPoolExecutor(1, context, _start, (place,))
        self._pid = self._executor.submit(os.getpid)

    def load(self, runner: bytes) -> Future:
        return self._submit(_load, runner)

    def run(self, batch: list) -> Future:
        return self._submit(_run, batch)

    def stop(self) -> None:
        if self._pid.done() and not self._pid.exception():
            for child in multiprocessing.active_children():
                if child.pid == self._pid.result():
                    child.terminate()  # raises SystemExit in it, so that it removes its unfinished files
        self._executor.shutdown(cancel_futures=True)

    def _submit(self, call: Callable[[Any], Outcome], argument: Any) -> Future:
        try:
            return self._executor.submit(call, argument)
        except BrokenProcessPool as loss:  # the worker died between two calls: a loss as during one
            future: Future = Future()
            future.set_exception(loss)
            return future


def _start(place: Place) -> None:
    """Prepares a worker process."""
    os.environ.update(place)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted driver stops its workers itself
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _load(runner: bytes) -> Outcome:
    global _runner
    _runner = pickle.loads(runner)  # imports the stage's libraries
    return _runner.load()


def _run(batch: list) -> Outcome:
    return _runner.run(batch)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _shown_gpus(num_workers: int, num_gpus: float | None, uses_gpu: bool) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of each worker of a stage, of which there are as many as fit the GPUs. None: as it is here.

    Args:
        num_workers: the largest number of workers.
        num_gpus: GPUs per worker; see `Resources`.
        uses_gpu: see `Workers`.
    """
    if num_gpus == 0:
        return [""] * num_workers
    gpus = _visible_gpus() if uses_gpu or num_gpus else []
    if not gpus:
        return [None] * num_workers
    size = max(1, int(num_gpus or 1))
    sharing = int(1 / num_gpus) if num_gpus and num_gpus < 1 else 1  # workers per GPU
    groups = [",".join(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]
    return [groups[i % len(groups)] for i in range(min(num_workers, len(groups) * sharing))]


def _visible_gpus() -> list[str]:
    """The names of this process's GPUs for `CUDA_VISIBLE_DEVICES`."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]
