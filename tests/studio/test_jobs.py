import json
import time
from pathlib import Path
from threading import Event as Signal

import pytest

from mask2dit.pipelines.events import Cancelled, SceneFinished, SceneStarted, StepFinished
from mask2dit.studio.jobs import CANCELLED, DONE, FAILED, INTERRUPTED, RUNNING, WAITING, Job, JobQueue


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


def job_of(project: str) -> Job:
    return Job(project=project, scenes=("x", "y"), numbers=(1, 3))


def wait_for(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_job_runs_at_a_time_in_order(folder):
    queue, go, order = JobQueue(folder), Signal(), []

    def work(job, observe):
        order.append(job.project)
        go.wait(20)

    first, second = (queue.submit(job_of(name), work) for name in "ab")
    wait_for(lambda: first.status == RUNNING)
    assert second.status == WAITING and queue.ahead(second) == 1 and order == ["a"]
    with pytest.raises(ValueError, match="is being generated"):
        queue.submit(job_of("a"), work)
    go.set()
    wait_for(lambda: second.status == DONE)
    assert order == ["a", "b"] and queue.of_project("a") is first


def test_progress_follows_the_events(folder):
    seen = []

    def work(job, observe):
        for event in (SceneStarted(0), SceneStarted(2), StepFinished((0, 2), 5, 10)):
            observe(event)
        seen.append((job.making, job.progress))
        for scene in (0, 1, 2):  # scene 2 of the story is kept
            observe(SceneFinished(scene, Path("clip.mp4"), "generated"))
        seen.append((job.finished, job.progress))

    job = JobQueue(folder).submit(job_of("a"), work)
    wait_for(lambda: not job.is_open)
    assert seen == [((1, 3), 0.5), ((1, 3), 1.0)] and job.describe()["progress"] == 1.0


def test_a_job_is_cancelled_at_its_next_event_or_before_it_starts(folder):
    queue, running = JobQueue(folder), Signal()

    def work(job, observe):
        running.set()
        while True:
            observe(StepFinished((0,), 1, 10))
            time.sleep(0.01)

    first, second = (queue.submit(job_of(name), work) for name in "ab")
    assert running.wait(20)
    queue.cancel(second.id)
    assert second.status == CANCELLED
    queue.cancel(first.id)
    wait_for(lambda: first.status == CANCELLED)
    with pytest.raises(ValueError, match="no job"):
        queue.cancel("nowhere")


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "cannot write x: make room on that disk"), "cannot write x: make room on that disk"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory does not suffice"),
        (FloatingPointError("scene 2 is not finite"), "scene 2 is not finite"),
        (KeyError("oh"), "oh"),
    ],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(folder, error, message):
    queue = JobQueue(folder)

    def fail(job, observe):
        raise error

    failed = queue.submit(job_of("a"), fail)
    wait_for(lambda: failed.status == FAILED)
    assert message in failed.message
    after = queue.submit(job_of("a"), lambda job, observe: None)
    wait_for(lambda: after.status == DONE)
    assert queue.of_project("a") is after


def test_a_restart_finds_the_last_jobs_and_tells_what_was_interrupted(folder):
    queue = JobQueue(folder)
    stuck = queue.submit(job_of("a"), lambda job, observe: Signal().wait(60))
    wait_for(lambda: stuck.status == RUNNING)
    (folder / "b/job.json").write_text(json.dumps({"project": "../x"}))
    again = JobQueue(folder)
    assert again.of_project("b") is None
    found = again.of_project("a")
    assert (found.id, found.status) == (stuck.id, INTERRUPTED) and "generate again" in found.message
    again.submit(job_of("a"), lambda job, observe: None)


def test_cancelled_is_no_failure(folder):
    def work(job, observe):
        raise Cancelled

    job = JobQueue(folder).submit(job_of("a"), work)
    wait_for(lambda: not job.is_open)
    assert job.status == CANCELLED
