"""Shares batches of work between workers. What a worker is, the engines decide."""

import logging
import os
import socket
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)

MAX_LOSSES = 3  # of workers by the same batch, or in a row while loading
IN_FLIGHT = 2  # batches per worker: one in work, one that waits beside it
PATIENCE = 60.0  # seconds without a worker after which that is reported

Process = Callable[..., Iterator]
Outcome = tuple[list, Exception | None]
"""The results of a batch until the error that ended it; None if none did."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How workers run a stage."""

    load: Callable[[], Any] | None = None
    """Loads once per worker what the stage needs, such as a model, which becomes the stage's second argument."""
    here: Any = None
    """What `load` returns, if this process has it already; taken when this process does the work."""
    batch: int = 1
    """Items that a worker takes at a time."""
    uses_gpu: bool = False
    """True if the stage runs a model."""


class Runner:
    """A stage inside a worker.

    Args:
        process: the stage: takes items, and what `load` returned if there is a `load`, and yields results.
        load: see `Workers.load`.
    """

    def __init__(self, process: Process, load: Callable[[], Any] | None):
        self.process, self._load = process, load
        self.folder, self.level = os.getcwd(), logging.getLogger("mask2dit").getEffectiveLevel()
        self.loaded: tuple = ()

    def load(self) -> Outcome:
        """Called once, in the worker, before the first batch. Has no results."""
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mask2dit").setLevel(self.level)
        try:
            if not os.path.isdir(self.folder):
                raise FileNotFoundError(
                    f"{socket.gethostname()} has no folder {self.folder!r}, against which relative paths resolve: run on "
                    "storage that every node mounts under the same path"
                )
            os.chdir(self.folder)
            if self._load is not None:
                self.loaded = (self._load(),)
        except Exception as error:
            return [], _with_traceback(error)
        return [], None

    def run(self, batch: list) -> Outcome:
        """Runs the stage over a batch."""
        results = []
        try:
            for result in self.process(batch, *self.loaded):
                results.append(result)
        except Exception as error:
            return results, _with_traceback(error)
        return results, None


class Worker(Protocol):
    """A process that runs one stage after another. Calls return futures with an `Outcome`, in order."""

    lost: type[Exception] | tuple[type[Exception], ...]
    """Raised by futures whose worker has died."""

    def load(self, runner: Any) -> Future:
        """Begins a stage, by a `Runner` as the engine sends it."""

    def run(self, batch: list) -> Future:
        """Runs the stage over a batch."""

    def stop(self) -> None:
        """Ends the process, and the batch that it works on."""


class Pool:
    """Workers that outlive their stage, since a process takes seconds to import its libraries.

    Args:
        start: starts a worker at a place: what it takes of the machine, as the engine describes it.
    """

    def __init__(self, start: Callable[[Hashable], Worker]):
        self.start = start
        self.idle: dict[Hashable, list[Worker]] = {}

    def take(self, place: Hashable) -> Worker:
        """An idle worker of that place, or a new one."""
        idle = self.idle.get(place)
        return idle.pop() if idle else self.start(place)

    def give_back(self, place: Hashable, worker: Worker) -> None:
        self.idle.setdefault(place, []).append(worker)

    def stop_others(self, places: Iterable[Hashable] = ()) -> None:
        """Stops idle workers of all places but these, whose resources others need."""
        for place in self.idle.keys() - set(places):
            for worker in self.idle.pop(place):
                worker.stop()


def share(name: str, batches: Sequence[list], runner: Any, pool: Pool, places: Sequence[Hashable]) -> Iterator:
    """Yields the results of batches as they arrive, from one worker per place.

    A worker gets its next batch as soon as one is done, so that all are busy until the end; no more than `IN_FLIGHT` are with
    a worker. If a worker is lost, a new one takes its place, and its batches go to the first that is free.

    Raises:
        OSError: if a batch loses `MAX_LOSSES` workers, after all others are done; or if workers are lost while they load.
        Exception: what the stage raises, after the results before it.
    """
    pool.stop_others(places)
    sharing = _Sharing(name, batches, runner, pool)
    try:
        for place in places[: len(batches)]:
            sharing.start_worker(place)
        while sharing.is_unfinished():
            yield from sharing.step()
    finally:
        sharing.end()
    if sharing.given_up:
        items = ", ".join(_describe(batches[index]) for index in sharing.given_up)
        raise OSError(
            f"{name}: {MAX_LOSSES} workers died at each of these: {items}. All others are done. Such deaths come from too "
            "little memory or a defect in a library: give a worker more (fewer workers, a smaller batch) or leave the input "
            "out, and run again"
        )


class _Sharing:
    def __init__(self, name: str, batches: Sequence[list], runner: Any, pool: Pool):
        self.name, self.batches, self.runner, self.pool = name, batches, runner, pool
        self.waiting = deque(range(len(batches)))
        self.places: dict[Worker, Hashable] = {}
        self.in_work: dict[Worker, deque[int]] = {}
        """The batches that are with each worker, which works on the first."""
        self.futures: dict[Future, tuple[Worker, int | None]] = {}
        """The worker and its batch, or None while it loads."""
        self.losses: Counter = Counter()
        self.losses_at_start = 0
        self.has_started = self.has_complained = False
        self.given_up: list[int] = []

    def is_unfinished(self) -> bool:
        return bool(self.waiting) or any(self.in_work.values())

    def start_worker(self, place: Hashable) -> None:
        worker = self.pool.take(place)
        self.places[worker], self.in_work[worker] = place, deque()
        self.futures[worker.load(self.runner)] = worker, None

    def step(self) -> Iterator:
        """Waits for something to finish, and yields its results."""
        done, _ = wait(self.futures, timeout=PATIENCE, return_when=FIRST_COMPLETED)
        if not done and not (self.has_started or self.has_complained):
            self.has_complained = True
            logger.warning("%s: no worker has started yet; they may wait for resources of the cluster", self.name)
        for future in sorted(done, key=lambda future: future.exception() is not None):  # results before losses
            if future not in self.futures:
                continue
            worker, index = self.futures.pop(future)
            try:
                results, error = future.result()
            except worker.lost as loss:
                self._lose(worker, loss)
                continue
            if index is None:
                self.has_started, self.losses_at_start = True, 0
            else:
                self.in_work[worker].remove(index)
                yield from results
            if error is not None:
                raise error
            self._give(worker)

    def end(self) -> None:
        """Gives idle workers back and stops the others."""
        busy = {worker for worker, _ in self.futures.values()}
        for worker, place in self.places.items():
            if worker in busy:
                worker.stop()
            else:
                self.pool.give_back(place, worker)

    def _give(self, worker: Worker) -> None:
        # Towards the end, a batch waits for the first free worker rather than beside another batch.
        limit = IN_FLIGHT if len(self.waiting) > len(self.places) else 1
        while self.waiting and len(self.in_work[worker]) < limit:
            index = self.waiting.popleft()
            self.in_work[worker].append(index)
            self.futures[worker.run(self.batches[index])] = worker, index

    def _lose(self, worker: Worker, loss: Exception) -> None:
        place, indices = self.places.pop(worker), self.in_work.pop(worker)
        self.futures = {future: entry for future, entry in self.futures.items() if entry[0] is not worker}
        worker.stop()
        reason = str(loss).strip().splitlines()[0] if str(loss).strip() else type(loss).__name__
        if indices:
            logger.warning("%s: a worker died at %s (%s)", self.name, _describe(self.batches[indices[0]]), reason)
            self.losses[indices[0]] += 1
            if self.losses[indices[0]] >= MAX_LOSSES:
                self.given_up.append(indices.popleft())
        else:
            self.losses_at_start += 1
            if self.losses_at_start >= MAX_LOSSES:
                raise OSError(
                    f"{self.name}: {MAX_LOSSES} workers in a row died before they could work ({reason}): start fewer, or "
                    "give each more memory"
                )
        self.waiting.extendleft(reversed(indices))
        loading = {worker for worker, index in self.futures.values() if index is None}
        for other, of_other in self.in_work.items():
            if not of_other and other not in loading:
                self._give(other)
        if self.waiting:
            self.start_worker(place)


def in_batches(items: Sequence, size: int) -> list[list]:
    """Splits items into batches, in order, so that they are the same for every engine."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _describe(batch: list) -> str:
    names = [str(getattr(item, "id", getattr(item, "name", item)))[:100] for item in batch]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} items)"


def _with_traceback(error: Exception) -> Exception:
    """Adds where an error was raised, which it loses on its way from a worker."""
    error.add_note(f"In a worker:\n{traceback.format_exc()}")
    return error
