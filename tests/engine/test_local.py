import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mask2dit.engine.config import EngineConfig, Resources
from mask2dit.engine.local import LocalEngine
from mask2dit.engine.open import open_engine
from mask2dit.engine.share import Workers

STAGE = """
import os
import signal

def load(folder):
    (folder / f"loaded-{os.getpid()}").touch()
    return folder

def double(items, folder):
    for item in items:
        yield os.getpid(), 2 * item
        if item == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

def die_at_once(items, folder):
    for item in items:
        if item == 1 and not (folder / "died").exists():
            (folder / "died").touch()
            os._exit(1)
        yield item
"""


@pytest.mark.parametrize(
    "num_workers, num_gpus, uses_gpu, shown",
    [
        (3, None, True, ["0", "1", "2"]),
        (8, None, True, ["0", "1", "2", "3"]),
        (3, None, False, [None] * 3),
        (3, 1, False, ["0", "1", "2"]),  # a detector of the user's
        (3, 0, True, [""] * 3),
        (8, 2, True, ["0,1", "2,3"]),
        (8, 3, True, ["0,1,2"]),
        (6, 0.5, True, ["0", "1", "2", "3", "0", "1"]),
        (99, 0.4, True, ["0", "1", "2", "3"] * 2),
    ],
)
def test_workers_see_the_gpus_that_they_take(monkeypatch, num_workers, num_gpus, uses_gpu, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    places = []
    monkeypatch.setattr("mask2dit.engine.local.share", lambda *arguments: places.extend(arguments[-1]) or iter(()))
    engine = LocalEngine(EngineConfig(num_workers=num_workers, resources={"stage": Resources(num_gpus=num_gpus)}))
    assert list(engine.run("stage", iter, [1], Workers(uses_gpu=uses_gpu))) == []
    assert [dict(place).get("CUDA_VISIBLE_DEVICES") for place in places] == shown


def test_more_gpus_per_worker_than_there_are_are_refused_before_a_stage(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"resources.embed.num_gpus=3 .* 2 GPUs"):
        LocalEngine(EngineConfig(num_workers=2, resources={"embed": Resources(num_gpus=3)}))


def test_without_workers_this_process_does_the_work():
    engine = LocalEngine(EngineConfig())
    done = engine.run(
        "stage", lambda items, factor: (factor * item for item in items), [1, 2], Workers(load=lambda: 3)
    )
    assert list(done) == [3, 6]


@pytest.mark.slow
def test_processes_share_the_work_and_one_that_is_killed_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "stage_of_the_test.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    import stage_of_the_test as stage

    config = EngineConfig(num_workers=2, resources={"double": Resources(batch=2)})
    with open_engine(config) as engine:
        workers = Workers(load=partial(stage.load, tmp_path))
        done = list(engine.run("double", stage.double, range(8), workers))
        again = list(engine.run("double", stage.double, range(8), workers))
    for results in (done, again):
        assert sorted(result for _, result in results) == [2 * i for i in range(8)]
    pids = {pid for pid, _ in done + again}
    assert os.getpid() not in pids and 2 <= len(pids) <= 3
    assert (tmp_path / "died").exists()
    assert len(list(tmp_path.glob("loaded-*"))) in (3, 4)  # a worker that still loads at the end of a stage is stopped
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.slow
def test_a_worker_that_dies_while_results_of_the_batch_before_are_taken_loses_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "stage_of_the_test.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stage_of_the_test", raising=False)
    import stage_of_the_test as stage

    taken = []
    with open_engine(EngineConfig(num_workers=1)) as engine:
        for item in engine.run("stage", stage.die_at_once, range(4), Workers(load=partial(stage.load, tmp_path))):
            if not taken:
                until((tmp_path / "died").exists)
                time.sleep(0.5)  # so that the engine notices before it hands out the next batch
            taken.append(item)
    assert sorted(taken) == [0, 1, 2, 3]
    assert "a worker died at 1" in caplog.text


DRIVER = """
from stage_of_the_test import wait
from mask2dit.engine.config import EngineConfig
from mask2dit.engine.open import open_engine
from mask2dit.engine.share import Workers

if __name__ == "__main__":
    with open_engine(EngineConfig(num_workers=2)) as engine:
        list(engine.run("wait", wait, range(4), Workers()))
"""
WAITS = """
import os
import time
from pathlib import Path

def wait(items):
    for item in items:
        (Path(__file__).parent / f"works-{os.getpid()}").touch()
        time.sleep(60)
        yield item
"""


@pytest.mark.slow
def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    (tmp_path / "stage_of_the_test.py").write_text(WAITS)
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], tmp_path)))}
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py"], env=environment)
    until(lambda: len(list(tmp_path.glob("works-*"))) == 2)
    driver.kill()
    driver.wait()
    until(
        lambda: not any(Path("/proc", path.name.removeprefix("works-")).exists() for path in tmp_path.glob("works-*"))
    )


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 seconds")
