"""The queue of generations: one runs at a time, and each can be watched and cancelled."""

import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue
from threading import RLock, Thread

from mask2dit.files import read_json, write_text
from mask2dit.pipelines.events import Cancelled, Event, SceneFinished, SceneStarted, StepFinished

logger = logging.getLogger(__name__)

WAITING, RUNNING, DONE, FAILED, CANCELLED, INTERRUPTED = (
    "waiting",
    "running",
    "done",
    "failed",
    "cancelled",
    "interrupted",
)
JOB = "job.json"  # in the project's folder: its last job


@dataclass
class Job:
    """A generation of some scenes of a project."""

    project: str
    scenes: tuple[str, ...]
    """Ids of the scenes that are made."""
    numbers: tuple[int, ...]
    """Their numbers in the story, counted from 1."""
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    status: str = WAITING
    message: str = ""
    """What went wrong, in one sentence."""
    making: tuple[int, ...] = ()
    """Numbers of the scenes that are being denoised."""
    step: int = 0
    num_steps: int = 0
    finished: tuple[int, ...] = ()
    """Numbers of the scenes that are done."""
    submitted_at: float = field(default_factory=time.time)
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def is_open(self) -> bool:
        """True if it waits or runs."""
        return self.status in (WAITING, RUNNING)

    @property
    def progress(self) -> float:
        """Share that is done, from 0 to 1."""
        if self.status == DONE:
            return 1.0
        share = len(self.making) * self.step / self.num_steps if self.num_steps else 0.0
        return min(1.0, (len(self.finished) + share) / max(1, len(self.scenes)))

    def describe(self) -> dict:
        """The job as the interface for programs returns it."""
        return {**asdict(self), "progress": round(self.progress, 3)}


Work = Callable[[Job, Callable[[Event], None]], None]


class JobQueue:
    """Runs jobs one after another in a thread of its own.

    Args:
        folder: the folder of the projects, in which each keeps its last job. Jobs that a killed process left open are
            marked as interrupted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._jobs: dict[str, Job] = {}
        self._work: dict[str, Work] = {}
        self._cancelled: set[str] = set()
        self._lock = RLock()
        self._queue: Queue[str] = Queue()
        for path in folder.glob(f"*/{JOB}"):
            self._recover(path)
        Thread(target=self._run_all, name="studio jobs", daemon=True).start()

    def submit(self, job: Job, work: Work) -> Job:
        """Adds a job. `work` is called with it and an observer, which it calls with events.

        Raises:
            ValueError: if the project has an open job.
            OSError: if the disk is full.
        """
        with self._lock:
            if (other := self.of_project(job.project)) and other.is_open:
                raise ValueError("this project is being generated: wait for it, or cancel it")
            self._save(job)
            self._jobs[job.id], self._work[job.id] = job, work
        self._queue.put(job.id)
        return job

    def get(self, id: str) -> Job:
        """Returns a job. Raises `ValueError` if there is none with this id."""
        if id not in self._jobs:
            raise ValueError(f"there is no job {str(id)[:40]!r}")
        return self._jobs[id]

    def of_project(self, project: str) -> Job | None:
        """Returns the last job of a project."""
        with self._lock:
            return next((job for job in reversed(self._jobs.values()) if job.project == project), None)

    def ahead(self, job: Job) -> int:
        """Number of jobs that run or wait before this one."""
        with self._lock:
            jobs = list(self._jobs.values())
            return sum(other.is_open for other in jobs[: jobs.index(job)])

    def cancel(self, id: str) -> None:
        """Stops a job: at once if it waits, else at its next step. Scenes that are done stay."""
        with self._lock:
            job = self.get(id)
            self._cancelled.add(id)
            if job.status == WAITING:
                self._end(job, CANCELLED)

    def _run_all(self) -> None:
        while True:
            job = self._jobs[self._queue.get()]
            if job.status != WAITING:
                continue
            job.status, job.started_at = RUNNING, time.time()
            try:
                self._work.pop(job.id)(job, lambda event, job=job: self._observe(job, event))
                self._end(job, DONE)
            except Cancelled:
                self._end(job, CANCELLED)
            except Exception as error:  # whatever it is, the next job has to run
                logger.exception("Job %s of project %s failed", job.id, job.project)
                self._end(job, FAILED, explain(error))

    def _observe(self, job: Job, event: Event) -> None:
        if job.id in self._cancelled:
            raise Cancelled
        match event:
            case SceneStarted(scene=scene):
                job.making, job.step = (*job.making, scene + 1), 0
            case StepFinished(step=step, num_steps=num_steps):
                job.step, job.num_steps = step, num_steps
            case SceneFinished(scene=scene) if scene + 1 in job.numbers:
                job.making = tuple(number for number in job.making if number != scene + 1)
                job.finished = (*job.finished, scene + 1)

    def _end(self, job: Job, status: str, message: str = "") -> None:
        job.status, job.message, job.making, job.ended_at = status, message, (), time.time()
        try:
            self._save(job)
        except OSError as error:  # on a full disk; the page still shows this job
            logger.warning("%s", explain(error))

    def _save(self, job: Job) -> None:
        write_text(self.folder / job.project / JOB, json.dumps(asdict(job), indent=2, ensure_ascii=False) + "\n")

    def _recover(self, path: Path) -> None:
        try:
            record = read_json(path, "delete it")
            lists = {name: tuple(record[name]) for name in ("scenes", "numbers", "making", "finished")}
            job = Job(**{**record, **lists, "project": path.parent.name})
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s is left out: %s", path, error)
            return
        if job.is_open:
            job.status, job.making = INTERRUPTED, ()
            job.message = (
                "the studio was stopped meanwhile: scenes that were done are kept; generate again for the others"
            )
        self._jobs[job.id] = job


def explain(error: Exception) -> str:
    """Explains an error in one sentence for the page."""
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror  # raised by this project with a full sentence
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "the memory does not suffice: choose a smaller size, fewer frames or another memory mode"
    return str(error).split("\n")[0] or type(error).__name__
