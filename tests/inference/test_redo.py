"""One scene anew: the others' files are those of the earlier run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mask2dit.config import load_config
from mask2dit.inference import run
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.run import generate
from mask2dit.pipelines.events import Cancelled, PreviewMade, SceneFinished, SceneStarted, StepFinished
from mask2dit.video.reading import open_video

pytestmark = pytest.mark.slow

PROMPTS = ["a fox", "a lake", "a hut", "night"]


def redo(record, *overrides) -> Path:
    """What the command does with a record and overrides."""
    return generate(load_config(InferenceConfig, record.with_suffix(".json"), overrides))


def clips(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.with_suffix("").glob("scene_?.mp4"))]


def same(first: Path, second: Path) -> list[bool]:
    """True for each scene that both runs have with equal files."""
    return [a == b for a, b in zip(clips(first), clips(second))]


def sources(output: Path) -> list[str]:
    return [scene["source"] for scene in json.loads(output.with_suffix(".json").read_text())["scenes"]]


def test_one_scene_is_made_anew_and_the_others_pixels_stay_as_they_were(config):
    first = generate(config(prompts=PROMPTS[:3]))
    second = redo(first, "redo=[2]", "seed=5")
    assert (first.name, second.name) == ("00001.mp4", "00002.mp4")
    assert same(first, second) == [True, False, True] and sources(second) == ["kept", "generated", "kept"]
    for name in ("00001.mp4", "00001_4x.mp4"):
        before = open_video(first.with_name(name)).read(range(27))
        after = open_video(first.with_name(name.replace("1", "2", 1))).read(range(27))
        assert [(before[i : i + 9] == after[i : i + 9]).all().item() for i in (0, 9, 18)] == [True, False, True]
    again = redo(first, "redo=[2]", "seed=5")
    assert clips(again) == clips(second)
    assert redo(second).read_bytes() == second.read_bytes()  # a record reproduces its run
    third = redo(second, "redo=[3]", "seed=6")
    assert same(second, third) == [True, True, False]


def test_a_changed_prompt_changes_its_scene_and_those_that_follow_only_if_asked(config):
    first = generate(config(prompts=PROMPTS, window=2))
    changed = "prompts=[a fox, a lake, a palace, night]"
    assert same(first, redo(first, changed, "redo=[3]")) == [True, True, False, True]
    assert same(first, redo(first, changed, "redo=[3]", "following=true")) == [True, True, False, False]
    with pytest.raises(ValueError, match=r"prompt of scene 3 .*add 3 to redo"):
        redo(first, changed, "redo=[2]")


def test_another_seed_takes_the_place_of_a_scenes_own(config):
    first = generate(config(scene_seeds=[3, 7]))
    second, third = redo(first, "redo=[2]"), redo(first, "redo=[2]", "seed=5")
    assert [clips(output)[0] for output in (second, third)] == [clips(first)[0]] * 2
    assert clips(second)[1] != clips(third)[1]
    records = [json.loads(output.with_suffix(".json").read_text()) for output in (second, third)]
    assert [[scene["seed"] for scene in record["scenes"]] for record in records] == [[3, 7], [3, 5]]


def test_a_scene_is_added_at_the_end_and_given_scenes_need_their_videos_no_longer(config, clip):
    first = generate(config(context_videos=[clip]))
    Path(clip).unlink()
    second = redo(first, "prompts=[a fox, a lake, night]", "redo=[3]")
    assert same(first, second) == [True, True] and len(clips(second)) == 3
    scenes = json.loads(second.with_suffix(".json").read_text())["scenes"]
    assert [scene["source"] for scene in scenes] == ["kept", "kept", "generated"]
    assert scenes[0]["context"]["path"] == clip and scenes[1]["context"] is None
    with pytest.raises(ValueError, match="scene 1, which is given"):
        redo(second, "redo=[1]")


def test_lists_with_one_entry_per_scene_reach_to_scenes_that_are_added(config):
    lists = {"scene_seeds": [3, 7], "num_frames": [9, 5], "negative_prompt": ["rain", "fog"]}
    first = generate(config(**lists, scene_mask=[True, True], name="first"))
    second = redo(first, "prompts=[a fox, a lake, night]", "redo=[3]")
    assert second.name == "00001.mp4" and same(first, second) == [True, True]
    record = json.loads(second.with_suffix(".json").read_text())
    assert {key: record["config"][key] for key in (*lists, "scene_mask")} == {
        "scene_seeds": [3, 7, None],
        "num_frames": [9, 5, 5],
        "negative_prompt": ["rain", "fog", "fog"],
        "scene_mask": [True, True, True],
    }
    with pytest.raises(ValueError, match="scene_seeds has 2 entries for 3"):
        config(prompts=PROMPTS[:3], scene_seeds=[3, 7])  # not of a record


def test_what_cannot_be_kept_is_refused_before_weights_are_read(config, monkeypatch):
    first = generate(config())
    monkeypatch.setattr(run, "load_pipeline", lambda *args: pytest.fail("weights were read"))
    refused = {
        "redo names scene 3, but there are 2": ["redo=[3]"],
        "redo counts scenes from 1, but names 0": ["redo=[0]"],
        "fps=9 is not the 8 of": ["redo=[1]", "fps=9"],
        "nothing to generate": ["redo=[]"],
    }
    for message, overrides in refused.items():
        with pytest.raises(ValueError, match=message):
            redo(first, *overrides)
    with pytest.raises(ValueError, match="pass its record"):
        config(redo=[1])
    with pytest.raises(FileNotFoundError, match=r"no record 'nowhere\.json'"):
        generate(config(redo=[1], record="nowhere.json"))
    (first.with_suffix("") / "scene_2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001/scene_2\.safetensors is missing"):
        redo(first, "redo=[1]")
    first.with_suffix(".json").write_text('{"scenes": []}')
    with pytest.raises(ValueError, match=r"00001\.json is not the record"):
        generate(replace(config(), redo=[1], record=str(first.with_suffix(".json"))))


def test_several_seeds_make_a_row_of_videos_and_one_sheet(config):
    first = generate(config(count=3, seed=7))
    assert [path.name for path in sorted(first.parent.glob("0000?.mp4"))] == ["00001.mp4", "00002.mp4", "00003.mp4"]
    records = [json.loads(path.read_text())["config"] for path in sorted(first.parent.glob("*.json"))]
    assert [(record["seed"], record["count"]) for record in records] == [(7, 1), (8, 1), (9, 1)]
    assert len({path.read_bytes() for path in first.parent.glob("0000?.mp4")}) == 3
    assert Image.open(first.with_name("00001-00003.png")).height > 3 * 160
    assert generate(config(seed=8)).read_bytes() == first.with_stem("00002").read_bytes()


def test_scenes_are_written_as_soon_as_they_are_done_with_previews_before(config):
    events = []

    def watch(event):
        if isinstance(event, PreviewMade):
            assert Image.open(folder / f"scene_{event.scene + 1}_preview.png").size == (96, 64)
        if isinstance(event, SceneFinished):
            assert open_video(event.path).num_frames == 9 and not folder.with_suffix(".mp4").exists()
        events.append(type(event))

    story = config(prompts=PROMPTS[:3], window=2, num_inference_steps=2, preview_every=1)
    folder = Path(story.save_path) / "00001"
    generate(story, watch)
    window = [StepFinished, PreviewMade, PreviewMade, StepFinished]
    last = [SceneStarted, StepFinished, PreviewMade, StepFinished, SceneFinished]
    assert events == [SceneStarted] * 2 + window + [SceneFinished] * 2 + last
    assert not list(folder.glob("*.png"))


def test_a_cancelled_run_leaves_nothing_but_its_finished_scenes_in_the_store(config):
    def cancel(event):
        if isinstance(event, SceneFinished):
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(config(window=1), cancel)
    (store,) = Path(config().save_path).iterdir()
    assert store.name == "scenes" and len(list(store.iterdir())) == 1
