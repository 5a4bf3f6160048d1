"""The engine that runs stages in this process, or in several processes of this machine."""

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mask2dit.engine.config import EngineConfig, Resources
from mask2dit.engine.share import Outcome, Process, Runner, Workers, in_batches, share

_runner: Runner  # of a worker process


class LocalEngine:
    """Runs stages on this machine.

    Args:
        config: the number of workers and their resources.
    """

    def __init__(self, config: EngineConfig):
        self.config = config

    def run(self, name: str, process: Process, items: Sequence, workers: Workers) -> Iterator:
        """Yields the results of a stage over items, in any order.

        Args:
            name: the stage's name, a key of `resources`.
            process: the stage, a generator function over items.
            items: the items.
            workers: how workers run it.
        """
        if self.config.num_workers is None:
            yield from process(items, *([workers.load()] if workers.load else []))
            return
        resources = self.config.resources.get(name, Resources())
        batches = in_batches(items, resources.batch or workers.batch)
        gpus = _visible_gpus() if workers.uses_gpu else []
        count = self.config.num_workers
        if gpus:
            count = max(1, min(count, int(len(gpus) / (resources.num_gpus or 1))))
        runner = pickle.dumps(Runner(process, workers.load, logging.getLogger("mask2dit").getEffectiveLevel()))
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        places = itertools.cycle([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}])
        start = lambda: LocalWorker(runner, {"OMP_NUM_THREADS": threads, **next(places)})  # noqa: E731
        yield from share(name, batches, start, count)


class LocalWorker:
    """A process of this machine that runs one stage.

    Args:
        runner: the pickled `Runner`.
        environment: variables to set before libraries read them.
    """

    lost = BrokenProcessPool

    def __init__(self, runner: bytes, environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self._executor = ProcessPoolExecutor(1, context, _start, (runner, environment))
        self._loaded: Future | None = None

    def load(self) -> Future:
        self._loaded = self._executor.submit(_call, "load")
        return self._loaded

    def run(self, batch: list) -> Future:
        return self._executor.submit(_call, "run", batch)

    def stop(self) -> None:
        if self._loaded is not None and self._loaded.done() and not self._loaded.exception():
            pids, _ = self._loaded.result()
            for child in multiprocessing.active_children():
                if child.pid in pids:
                    child.terminate()  # raises SystemExit in it, so that it removes its unfinished files
        self._executor.shutdown(cancel_futures=True)


def _start(runner: bytes, environment: dict[str, str]) -> None:
    """Prepares a worker process."""
    global _runner
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted driver stops its workers itself
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _runner = pickle.loads(runner)  # imports the stage's libraries


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: str, *arguments: list) -> Outcome:
    return getattr(_runner, method)(*arguments)


def _visible_gpus() -> list[str]:
    """The names of this process's GPUs for `CUDA_VISIBLE_DEVICES`."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]
