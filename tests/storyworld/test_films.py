import json
from dataclasses import asdict

import numpy as np
import pytest

from mask2dit.data.check import check_manifest
from mask2dit.data.config import CheckConfig, DataConfig
from mask2dit.data.datasets import FineTuneDataset, PretrainDataset
from mask2dit.storyworld.films import FilmsConfig, make_films, story_of
from mask2dit.storyworld.measure import measure_scene, nearest_setting
from mask2dit.storyworld.observe import observe_scene
from mask2dit.storyworld.render import render_scene, render_story
from mask2dit.storyworld.world import HELD_OUT_ACTIONS, caption, describe, is_held_out
from mask2dit.video.reading import FileReader


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    config = FilmsConfig(
        output_dir=str(folder),
        num_clips=6,
        num_stories=6,
        num_held_out=2,
        drifting_share=0.5,
        thresholds=[0.8],
        num_workers=1,
    )
    make_films(config)
    return config, folder


def data_config(folder, name, **options):
    return DataConfig(manifest=str(folder / name), num_frames=9, height=64, width=64, max_stride=1, **options)


def rows_of(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("name", "kind", "num_rows"),
    [("pretrain.csv", "pretrain", 6), ("sft.json", "finetune", 6), ("held_out.json", "finetune", 2)],
)
def test_the_check_of_manifests_finds_nothing_wrong(films, name, kind, num_rows):
    report = check_manifest(CheckConfig(**asdict(data_config(films[1], name, kind=kind))))
    assert report.num_rows == num_rows and report.problems == []


@pytest.mark.parametrize(
    ("dataset", "name", "kind"),
    [(PretrainDataset, "pretrain.csv", "pretrain"), (FineTuneDataset, "sft.json", "finetune")],
)
def test_training_reads_samples_from_them(films, tmp_path, dataset, name, kind):
    sample = dataset(data_config(films[1], name, kind=kind), tmp_path / "quarantine.jsonl")[0, 0]
    assert sample["pixels"].shape == (3, 9, 3, 64, 64)
    assert all(text.startswith("Actor") for text in sample["captions"])


def test_films_show_their_stories_nearly_without_loss(films):
    config, folder = films
    for seed, row in enumerate(rows_of(folder, "sft.json")):
        story = story_of(config, "stories", seed)
        for k, (values, scene) in enumerate(zip(row["values"], render_story(story))):
            assert values["caption"] == caption(story, k)
            error = FileReader(folder / values["url"]).read(range(9)).numpy().astype(float) - scene
            assert 10 * np.log10(255**2 / np.square(error).mean()) > 35


def test_held_out_films_have_what_the_others_lack(films):
    config, _ = films
    assert all(is_held_out(story_of(config, "held_out", seed)) for seed in range(2))
    assert not any(is_held_out(story_of(config, part, seed)) for part in ("clips", "stories") for seed in range(12))


def test_similarity_tells_drifting_stories_apart_and_thresholds_leave_them_out(films):
    config, folder = films
    rows = rows_of(folder, "sft.json")
    drifts = [len(set(story_of(config, "stories", seed).identities)) > 1 for seed in range(6)]
    assert any(drifts) and not all(drifts)
    assert all(row["similarity"] > 0.95 for row, drift in zip(rows, drifts) if not drift)
    assert rows_of(folder, "sft_0.8.json") == [row for row in rows if row["similarity"] >= 0.8]
    assert len(rows_of(folder, "sft_0.8.json")) < 6


@pytest.mark.parametrize("part", ["unnamed_colours", "unnamed_settings"])
def test_films_whose_captions_leave_something_out_are_as_consistent_as_others(tmp_path, part):
    sizes = {"num_clips": 0, "num_stories": 6, "num_held_out": 1, "num_workers": 1}
    config = FilmsConfig(output_dir=str(tmp_path), thresholds=[0.95], **sizes, **{part: 1.0})
    make_films(config)
    for row in rows_of(tmp_path, "sft.json"):
        assert all("<extra_id_0>" in scene["caption"] for scene in row["values"]) and row["similarity"] > 0.95
    assert not any("<extra_id_0>" in scene["caption"] for scene in rows_of(tmp_path, "held_out.json")[0]["values"])


def test_similarity_is_not_measured_without_thresholds(tmp_path):
    make_films(FilmsConfig(output_dir=str(tmp_path), num_clips=0, num_stories=1, num_held_out=0, num_workers=1))
    assert "similarity" not in rows_of(tmp_path, "sft.json")[0]


def test_casts_are_as_large_as_asked_for_in_the_stories_alone():
    config = FilmsConfig(cast_shares=[0, 0, 1])
    assert {len(story_of(config, "stories", seed).actors) for seed in range(20)} == {3}
    assert [story_of(config, "held_out", seed) for seed in range(5)] == [
        story_of(FilmsConfig(), "held_out", seed) for seed in range(5)
    ]


def test_a_background_without_a_name_never_looks_like_a_setting_in_which_an_action_is_held_out():
    config = FilmsConfig(unnamed_settings=1.0)
    seen = set()
    for seed in range(20):
        story = story_of(config, "stories", seed)
        background = observe_scene(render_scene(story, 0)).background
        actions = {action for scene in story.scenes for action in scene.actions}
        assert not {(action, nearest_setting(background)) for action in actions} & HELD_OUT_ACTIONS
        assert caption(story, 0).endswith("<extra_id_0> the <extra_id_0>")
        assert "setting" not in measure_scene(render_scene(story, 0), describe(story, 0)).right
        seen.add(nearest_setting(background))
    assert None in seen and len(seen) > 1


def test_clips_are_of_other_stories_than_the_films(films):
    _, folder = films
    clips = {path.name[:6] for path in (folder / "clips").iterdir()}
    stories = {path.name[:6] for path in (folder / "stories").iterdir()}
    assert len(clips) == 6 and not clips & stories


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stories": -1}, "num_stories=-1 has to be 0 or more"),
        ({"num_scenes": 0}, "num_scenes=0 has to be at least 1"),
        ({"num_frames": 1}, "num_frames=1 has to be at least 2"),
        ({"height": 63}, "have to be even"),
        ({"height": 96}, "height=96 and width=64"),
        ({"drifting_share": 2.0}, "drifting_share=2.0 has to be between 0 and 1"),
        ({"unnamed_colours": -1.0}, "unnamed_colours=-1.0 has to be between 0 and 1"),
        ({"cast_shares": [0.5, 0.5]}, "have to be 3 probabilities that sum to 1"),
        ({"cast_shares": [0.3333333, 0.3333333, 0.3333333]}, "have to be 3 probabilities that sum to 1"),
        ({"cast_shares": [1.5, -0.5, 0.0]}, "have to be 3 probabilities that sum to 1"),
        ({"num_scenes": 1, "thresholds": [0.5]}, "thresholds are for the similarity of scenes"),
    ],
)
def test_what_cannot_be_rendered_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FilmsConfig(**options)
