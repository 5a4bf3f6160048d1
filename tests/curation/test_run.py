import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mask2dit.command import run_command
from mask2dit.curation import run as run_module
from mask2dit.curation.config import (
    CaptionConfig,
    CurationConfig,
    EmbedConfig,
    ExportConfig,
    FilterConfig,
    GroupConfig,
    SplitConfig,
    WriteConfig,
)
from mask2dit.curation.run import curate
from mask2dit.curation.stand_in import good_answer, stand_in
from mask2dit.data.check import check_manifest
from mask2dit.data.config import DataConfig
from mask2dit.data.datasets import FineTuneDataset, PretrainDataset
from mask2dit.data.manifests import read_manifest
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.video.cuts import Transition
from mask2dit.video.writing import write_video

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def lines(config, stage):
    return [json.loads(line) for path in Path(config.output).glob(f"{stage}*.jsonl") for line in path.open()]


def funnel(config, name="funnel.json"):
    return json.loads((Path(config.output) / name).read_text())


@pytest.fixture(scope="module")
def done(films, tiny_viclip, tmp_path_factory):
    """A configuration that was run."""
    folder = tmp_path_factory.mktemp("done")
    config = CurationConfig(
        films=str(films),
        output=str(folder / "out"),
        num_frames=17,
        split=SplitConfig(detectors=["content"]),
        embed=EmbedConfig(viclip=ViCLIPConfig(weights=str(tiny_viclip))),
        group=GroupConfig(threshold=0.7, ceiling=0.9999),
        caption=CaptionConfig(backend="stand_in"),
        export=ExportConfig(folder=str(folder / "manifests"), validation_share=0.0),
        device="cpu",
    )
    assert curate(config) == 0
    return config


@pytest.fixture
def copied(done, tmp_path):
    """The same, to be changed; keywords change its configuration."""
    shutil.copytree(done.output, tmp_path / "out")
    export = replace(done.export, folder=str(tmp_path / "manifests"))
    return lambda **changes: replace(done, **{"output": str(tmp_path / "out"), "export": export, **changes})


def test_one_command_goes_from_films_to_manifests_that_training_accepts(done):
    for kind, name, dataset in (
        ("finetune", "sft.json", FineTuneDataset),
        ("pretrain", "pretrain.csv", PretrainDataset),
    ):
        data = DataConfig(kind=kind, manifest=f"{done.export.folder}/{name}", num_frames=17, height=64, width=96)
        report = check_manifest(data)
        assert report.num_rows and not report.problems
        sample = dataset(data, Path(done.output) / "quarantine.jsonl")[0, 0]
        assert sample["pixels"].shape == (3, 17, 3, 64, 96)


def test_films_that_are_cut_already_become_groups_by_their_folders(config, drawing, damage, tmp_path):
    for name, scenes in drawing.FILMS.items():
        for number, scene in enumerate(scenes[:3], start=1):
            path = tmp_path / f"shots/{Path(name).stem}/shot_{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = [drawing.draw(scene, k / (scene.frames - 1)) for k in range(scene.frames)]
            write_video(path, frames, drawing.FPS)
        damage(Path(shutil.copy(path, path.with_name("shot_4.mp4"))))
    base = config(films=str(tmp_path / "shots"), shots="folder", write=WriteConfig(encode=False, remove_borders=False))
    assert curate(base) == 0
    rows = json.loads((Path(base.export.folder) / "sft.json").read_text())
    listed = {Path(row["values"][0]["url"]).parent.name: [Path(s["url"]).name for s in row["values"]] for row in rows}
    assert listed == {name: [f"shot_{i}.mp4" for i in (1, 2, 3)] for name in ("red_scarf", "blue_scarf")}
    assert funnel(base)["write"]["dropped"] == {"unreadable": 2}


def test_clips_can_stay_frame_ranges_of_the_films(copied, films, done):
    base = copied(write=WriteConfig(encode=False))
    (Path(base.output) / "clips").rename(Path(base.output) / "unused")
    assert curate(base) == 0
    assert not (Path(base.output) / "clips").exists()
    for kind, name in (("finetune", "sft.json"), ("pretrain", "pretrain.csv")):
        data = DataConfig(kind=kind, manifest=f"{base.export.folder}/{name}", num_frames=17, height=64, width=96)
        report, of_files = check_manifest(data), check_manifest(replace(data, manifest=f"{done.export.folder}/{name}"))
        assert not report.problems and report.num_clips == of_files.num_clips
        assert {clip.path.resolve().parent for row in read_manifest(data) for clip in row} <= {films, films / "bars"}
    assert '"range": [' in (Path(base.output) / "review.html").read_text()


def test_the_funnel_says_how_many_came_in_and_what_each_rule_removed(done, films):
    found = funnel(done)
    assert found["probe"] == {"in": 3, "kept": 2, "dropped": {"unreadable": 1}, "not done": 0}
    assert found["split"]["kept"] == 8 and found["split"]["dropped"] == {"too_short": 1}
    assert found["group"] == {"in": 2, "kept": 2, "dropped": {"gap": 1, "overlap": 1}, "not done": 0}
    assert found["single"]["dropped"] == {"too_short_for_pretraining": 1}
    card = (Path(done.export.folder) / "card.md").read_text()
    assert "| split | films, into scenes | 2 | 8 | too_short 1 |" in card
    assert "ViCLIP had random weights" in card and "never saw the pictures" in card
    assert "similarity.svg" in card and ">threshold " in (Path(done.export.folder) / "similarity.svg").read_text()


def test_a_second_run_computes_nothing(done, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("a stage was run again")

    before = {path: path.read_bytes() for path in Path(done.output).glob("*.jsonl")}
    for stage in (
        "probe",
        "split",
        "write",
        "score",
        "apply_filters",
        "embed",
        "group",
        "single",
        "caption",
        "verify",
    ):
        monkeypatch.setattr(run_module, stage, never)
    assert curate(done) == 0
    assert {path: path.read_bytes() for path in Path(done.output).glob("*.jsonl")} == before


def test_another_threshold_uses_the_features_and_captions_that_are_there(copied, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(run_module, "embed", never)
    stricter = copied(group=GroupConfig(threshold=0.75, ceiling=0.9999))
    num_captions = len(lines(stricter, "caption"))
    assert curate(stricter) == 0
    assert funnel(stricter)["group"]["kept"] == 2
    # One group is another window now, and leaves another clip alone: two captions more, the others are found again.
    assert len(lines(stricter, "caption")) == num_captions + 2


def test_features_of_other_weights_do_not_replace_those_that_are_there(copied, tmp_path):
    from mask2dit.encoders.untrained import build_untrained_viclip

    base = copied()
    weights = build_untrained_viclip(tmp_path / "untrained-other" / "untrained.safetensors", seed=1)
    before = {path: path.read_bytes() for path in Path(base.output, "features").iterdir()}
    curate(copied(embed=EmbedConfig(viclip=ViCLIPConfig(weights=str(weights)))))
    assert len(list(Path(base.output, "features").iterdir())) == 2 * len(before)
    assert {path: path.read_bytes() for path in before} == before


def test_other_settings_of_a_stage_redo_only_what_comes_out_otherwise(copied, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("a stage was run again")

    for stage in ("write", "score", "embed", "group", "caption", "verify"):
        monkeypatch.setattr(run_module, stage, never)
    base = copied(split=SplitConfig(detectors=["content"], content_threshold=26.0))
    assert curate(base) == 0
    assert len(lines(base, "split")) == 4


def test_doubts_about_cuts_are_shown_on_the_page_and_redo_nothing_else(copied, monkeypatch):
    """A detector finds the same cuts with more and less probable ones between them."""
    base = copied(split=SplitConfig(detectors=["doubting_detector:detect"]))
    doubting = ModuleType("doubting_detector")
    monkeypatch.setitem(sys.modules, "doubting_detector", doubting)
    for stage in ("write", "score", "embed", "group", "caption", "verify"):
        (Path(base.output) / f"{stage}.jsonl").unlink()
    doubting.detect = lambda reader: [Transition(60, 60), Transition(130, 130)]
    curate(base)
    page = Path(base.output) / "review.html"
    assert "where a transition is possible" not in page.read_text()

    def never(*arguments, **keywords):
        raise AssertionError("a stage was run again")

    for stage in ("write", "score", "embed", "group", "caption", "verify"):
        monkeypatch.setattr(run_module, stage, never)
    doubting.detect = lambda reader: [Transition(60, 60), Transition(90, 90, 0.3), Transition(130, 130)]
    curate(replace(base, split=replace(base.split, doubt_above=0.1)))
    assert "no cut at frame 90" in page.read_text()


BAD_CAPTIONS = {
    "an address without a scheme": ({"base_url": "localhost:8000/v1", "model": "m"}, "caption.base_url must begin"),
    "a key with other characters": ({"base_url": "http://localhost/v1", "model": "m"}, "not ASCII"),
    "no folder of a model": ({"backend": "transformers", "model": "nowhere", "device": "cpu"}, "has to be a folder"),
    "no GPU": ({"backend": "transformers", "model": "nowhere", "device": "cuda"}, "finds no GPU"),
}


@pytest.mark.parametrize("settings, message", BAD_CAPTIONS.values(), ids=BAD_CAPTIONS)
def test_captions_that_cannot_be_made_are_refused_before_any_film_is_opened(config, monkeypatch, settings, message):
    monkeypatch.setattr(run_module, "find_films", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel" if message == "not ASCII" else "key")
    with pytest.raises(ValueError, match=message):
        curate(config(caption=CaptionConfig(**settings)))


def test_files_that_were_deleted_are_made_again(copied):
    base = copied()
    clip = next(Path(base.output, "clips").rglob("*.mp4"))
    features = next(Path(base.output, "features").iterdir())
    clip.unlink()
    features.unlink()
    assert curate(base) == 0
    assert clip.is_file() and features.is_file()
    assert len(lines(base, "write")) == 9


def test_an_output_among_the_films_is_refused(copied, films):
    with pytest.raises(ValueError, match=r"output=.*out'.* films="):
        curate(copied(output=str(films / "out")))


def test_parts_share_the_work_and_the_whole_finds_it_done(copied):
    base = copied()
    before = {stage: lines(base, stage) for stage in ("split", "score", "caption")}
    for stage in before:
        (Path(base.output) / f"{stage}.jsonl").unlink()
    for part in ("0/2", "1/2"):
        assert curate(replace(base, shard=part)) == 0
    assert not (Path(base.export.folder) / "sft.json").exists()
    parts = [funnel(base, f"funnel.{i}-of-2.json")["probe"]["in"] for i in range(2)]
    assert sum(parts) == 3 and all(parts)
    assert curate(base) == 0
    assert (Path(base.export.folder) / "sft.json").exists()
    for stage, found in before.items():
        assert not (Path(base.output) / f"{stage}.jsonl").exists()
        assert {line["key"] for line in lines(base, stage)} == {line["key"] for line in found}


def test_without_a_captioner_everything_before_runs_and_what_is_missing_is_said(copied, caplog):
    base = copied(caption=CaptionConfig(), stages=["group", "single", "caption", "verify", "export"])
    assert curate(base) == 1
    assert "set caption.base_url and caption.model" in caplog.text
    assert funnel(base)["group"]["kept"] == 2 and "caption" not in funnel(base)


def test_stages_run_alone(copied):
    base = copied(stages=["split"])
    for stage in ("split", "write"):
        (Path(base.output) / f"{stage}.jsonl").unlink()
    assert curate(base) == 0
    assert len(lines(base, "split")) == 2 and not lines(base, "write")
    assert list(funnel(base)) == ["probe", "split", "write"] and funnel(base)["write"]["not done"] == 8


def test_filters_take_clips_out_of_groups(copied):
    base = copied(filter=FilterConfig(min_short_side=200))
    assert curate(base) == 1
    assert funnel(base)["filter"]["dropped"] == {"low_resolution": 8}
    assert funnel(base)["group"]["in"] == 0 and not (Path(base.export.folder) / "sft.json").exists()


def test_weights_that_are_missing_are_an_error_before_any_film_is_opened(config, monkeypatch):
    monkeypatch.setattr(run_module, "find_films", None)
    with pytest.raises(FileNotFoundError, match="there are no weights of ViCLIP at 'nowhere"):
        curate(config(embed=EmbedConfig(viclip=ViCLIPConfig(weights="nowhere.safetensors"))))


@pytest.mark.parametrize(
    "stage", ["probe", "split", "write", "score", "embed", "group", "single", "caption", "verify"]
)
def test_a_stage_that_is_interrupted_goes_on_where_it_was(copied, monkeypatch, stage):
    class Interrupted(Exception):
        pass

    real = getattr(run_module, stage)

    def stops(*arguments, **keywords):
        results = real(*arguments, **keywords)
        yield next(results)
        raise Interrupted

    base = copied()
    path = Path(base.output) / f"{stage}.jsonl"
    before = {line["key"] for line in lines(base, stage)}
    path.unlink()
    monkeypatch.setattr(run_module, stage, stops)
    with pytest.raises(Interrupted):
        curate(base)
    assert len(lines(base, stage)) == 1
    monkeypatch.setattr(run_module, stage, real)
    assert curate(base) == 0
    assert len(lines(base, stage)) == len(before) and {line["key"] for line in lines(base, stage)} == before


def test_a_refused_group_is_recorded_and_the_others_are_exported(copied):
    asked = []

    def filters_the_first(request):
        asked.append(request)
        return (400, "content_filter") if len(asked) == 1 else good_answer(request)

    with stand_in(filters_the_first) as url:
        base = copied(caption=CaptionConfig(base_url=url, model="m", concurrency=1))
        assert curate(base) == 0
        count = len(asked)
        assert funnel(base)["caption"]["dropped"] == {"refused": 1} and funnel(base)["caption"]["not done"] == 0
        assert len(json.loads((Path(base.export.folder) / "sft.json").read_text())) == 1
        assert curate(base) == 0 and len(asked) == count


def test_the_key_is_written_nowhere(copied, monkeypatch):
    monkeypatch.setenv("CURATION_TEST_KEY", "sk-secret-of-the-test")
    with stand_in() as url:
        base = copied(caption=CaptionConfig(base_url=url, model="m", api_key_env="CURATION_TEST_KEY"))
        assert curate(base) == 0
    files = [
        path for folder in (base.output, base.export.folder) for path in Path(folder).rglob("*") if path.is_file()
    ]
    assert len(files) > 20 and not any(b"sk-secret" in path.read_bytes() for path in files)


def test_a_new_film_is_all_that_is_done(config, films, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    os.link(films / "red_scarf.mp4", folder / "a.mp4")
    base = config(films=str(folder), stages=["probe", "split"])
    assert curate(base) == 0
    os.link(films / "red_scarf.mp4", folder / "b.mp4")
    assert curate(base) == 0
    assert [line["from"] for line in lines(base, "split")] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("name", ["films.yaml", "small.yaml"])
def test_the_configurations_that_come_along_can_be_read(name, capsys):
    arguments = [str(ROOT / "configs/curation" / name), "films=/nowhere/at/all", "stages=[probe]"]
    assert run_command(CurationConfig, "mask2dit.curation.run:curate", "", [*arguments, "output=/tmp"]) == 1
    assert "there is no folder of films '/nowhere/at/all'" in capsys.readouterr().err
