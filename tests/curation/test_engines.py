import json
import os
import shutil
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from mask2dit.curation.config import ON_WORKERS, SplitConfig
from mask2dit.curation.run import curate
from mask2dit.engine.config import Resources
from mask2dit.engine.share import Pool, Runner, in_batches, share

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def both(config, films, tmp_path):
    """A configuration over the drawn films and a real clip; a name is that of its folder."""
    shutil.copytree(films, tmp_path / "films")
    shutil.copy(ROOT / "datasets/extension/scene_1.mp4", tmp_path / "films")
    base = config(films=str(tmp_path / "films"), split=SplitConfig(detectors=["content"]))

    def make(name, **changes):
        export = replace(base.export, folder=str(tmp_path / name / "manifests"))
        return replace(base, output=str(tmp_path / name / "out"), export=export, **changes)

    return make


def results(config):
    """Everything that a run leaves except the card, which names folders: the lines of stages in any order."""
    out, manifests = Path(config.output), Path(config.export.folder)
    stages = {path.name: sorted(path.read_bytes().splitlines()) for path in out.glob("*.jsonl")}
    files = [*out.glob("clips/**/*.mp4"), *out.glob("features/*"), *manifests.glob("*.json"), *manifests.glob("*.csv")]
    return stages, {path.relative_to(out.parent).as_posix(): path.read_bytes() for path in files}


class MortalEngine:
    """Shares stages between workers in this process. In every stage, one dies with a batch done but not delivered."""

    def __init__(self):
        self.died_in = []

    def run(self, name, process, items, workers):
        pool = Pool(lambda place: MortalWorker(self.died_in, name))
        yield from share(name, in_batches(items, 2), Runner(process, workers.load), pool, ["place"] * 2)


class MortalWorker:
    lost = InterruptedError

    def __init__(self, died_in, stage):
        self.died_in, self.stage = died_in, stage

    def load(self, runner):
        self.runner = runner
        return self._future(runner.load())

    def run(self, batch):
        future = self._future(self.runner.run(batch))
        if self.stage not in self.died_in:
            self.died_in.append(self.stage)
            future = Future()
            future.set_exception(InterruptedError())
        return future

    def stop(self):
        pass

    def _future(self, outcome):
        future = Future()
        future.set_result(outcome)
        return future


def test_a_worker_that_dies_in_every_stage_and_ray_give_the_results_of_one_process(
    both, ray_cluster, tmp_path, monkeypatch
):
    alone = both("alone")
    assert curate(alone) == 0
    of_alone = results(alone)
    assert {"manifests/sft.json", "manifests/pretrain.csv"} <= of_alone[1].keys()
    assert "scene_1.mp4" in {json.loads(line)["from"] for line in of_alone[0]["split.jsonl"]}

    engine = MortalEngine()
    with monkeypatch.context() as patch:
        patch.setattr("mask2dit.curation.run.open_engine", lambda config: nullcontext(engine))
        mortal = both("mortal", embed=replace(alone.embed, batch_size=2))
        assert curate(mortal) == 0
    assert set(engine.died_in) == set(ON_WORKERS)
    assert results(mortal)[1].keys() >= {"manifests/sft.json", "manifests/pretrain.csv"}
    for name, content in of_alone[1].items():
        if not name.startswith("out/features"):  # other batches, so other files
            assert results(mortal)[1][name] == content

    class DiesOnce(Runner):
        def run(self, batch):
            outcome = super().run(batch)
            if self.process.func.__name__ not in ("write", "embed"):
                return outcome
            try:
                (tmp_path / f"died-in-{self.process.func.__name__}").touch(exist_ok=False)
            except FileExistsError:
                return outcome
            os._exit(1)

    monkeypatch.setattr("mask2dit.engine.ray.Runner", DiesOnce)
    small = {name: Resources(batch=2) for name in ON_WORKERS if name != "embed"}
    on_ray = both("ray", engine="ray", num_workers=2, resources=small)
    assert curate(on_ray) == 0
    assert len(list(tmp_path.glob("died-in-*"))) == 2
    assert results(on_ray) == of_alone
