import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mask2dit.curation.config import ON_WORKERS
from mask2dit.curation.run import curate
from mask2dit.engine.config import Resources
from mask2dit.engine.share import Runner

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def both(config, films, tmp_path):
    """A configuration over the drawn films and a real clip; a name is that of its folder."""
    shutil.copytree(films, tmp_path / "films")
    shutil.copy(ROOT / "datasets/extension/scene_1.mp4", tmp_path / "films")
    base = config(films=str(tmp_path / "films"))

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


def test_ray_gives_the_manifests_of_one_process_although_a_worker_dies_in_every_stage(
    both, ray_cluster, tmp_path, monkeypatch
):
    class DiesOnce(Runner):
        """Dies with a batch done but not delivered, once per stage."""

        def run(self, batch):
            outcome = super().run(batch)
            try:
                (tmp_path / f"died-in-{self.process.func.__name__}").touch(exist_ok=False)
            except FileExistsError:
                return outcome
            os._exit(1)

    alone = both("alone")
    assert curate(alone) == 0
    monkeypatch.setattr("mask2dit.engine.ray.Runner", DiesOnce)
    small = Resources(batch=2)
    shared = both(
        "shared", engine="ray", num_workers=2, resources={name: small for name in ON_WORKERS if name != "embed"}
    )
    assert curate(shared) == 0
    assert {path.name for path in tmp_path.glob("died-in-*")} == {f"died-in-{name}" for name in ON_WORKERS}
    of_alone, of_shared = results(alone), results(shared)
    assert of_shared[0] == of_alone[0]
    assert of_shared[1] == of_alone[1]
    assert {"manifests/sft.json", "manifests/pretrain.csv"} <= of_shared[1].keys()
    assert "scene_1.mp4" in {json.loads(line)["from"] for line in of_shared[0]["split.jsonl"]}
