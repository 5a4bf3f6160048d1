"""Generation from a story file."""

import json

import numpy as np
import pytest
import torch

from mask2dit.config import load_config
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.from_story import resolve_story
from mask2dit.inference.run import generate, load_skeleton, plan_generation
from mask2dit.stories import Scene, Story, write_story
from mask2dit.video.writing import write_video

FOX = "a red fox"


@pytest.fixture
def story(tmp_path):
    """Writes a story of two scenes into a folder of its own; keywords change it."""

    def make(*scenes: Scene, **changes) -> str:
        path = tmp_path / "told/story.yaml"
        path.parent.mkdir(exist_ok=True)
        scenes = scenes or (Scene(prompt="Actor1 walks."), Scene(prompt="Actor1 sleeps."))
        write_story(path, Story(**{"title": "The Fox", "cast": {"Actor1": FOX}, "scenes": scenes, **changes}))
        return str(path)

    return make


@pytest.fixture
def resolve(small_model):
    def resolved(path: str, **changes) -> InferenceConfig:
        config = InferenceConfig(**{"model": str(small_model), "story": path, "height": 64, "width": 96, **changes})
        return resolve_story(config, load_skeleton(config.model))[0]

    return resolved


def test_a_story_file_says_what_prompts_lengths_and_seeds_would(story, resolve):
    path = story(
        Scene(prompt="Actor1 walks.", seconds=2),
        Scene(prompt="Actor1 sleeps.", seed=12),
        Scene(prompt="Actor1 wakes.", video="wake.mp4", frames=5),
        style="watercolour",
        negative="blurred",
        seed=7,
    )
    config = resolve(path, num_frames=9)
    assert config.story is None
    assert config.prompts == [f"Actor1 ({FOX}) {does}. watercolour" for does in ("walks", "sleeps", "wakes")]
    assert (config.negative_prompt, config.seed, config.num_frames) == ("blurred", 7, [17, 9, 5])
    assert config.scene_mask == [True, True, False] and config.scene_seeds == [None, 12, None]
    assert config.context_videos == [path.replace("story.yaml", "wake.mp4")]  # beside the story file
    assert resolve(path, seed=8).seed == 8
    assert resolve(path, fps=4).num_frames[0] == 9


def test_what_a_story_leaves_out_is_the_configurations(story, resolve):
    config = resolve(story(), negative_prompt="dark")
    assert (config.negative_prompt, config.seed, config.num_frames) == ("dark", 42, 9)
    assert (config.scene_mask, config.scene_seeds, config.context_videos) == (None, None, [])


@pytest.mark.parametrize("key, value", [("prompts", ["a"]), ("context_videos", ["a.mp4"]), ("scene_mask", [True])])
def test_a_story_and_what_it_replaces_exclude_each_other(key, value):
    with pytest.raises(ValueError, match=f"story=a.yaml and {key} exclude each other"):
        InferenceConfig(story="a.yaml", **{key: value})


def test_a_story_on_the_command_line_replaces_the_prompts_of_the_file_and_the_other_way_round(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("prompts: [a, b]\ncontext_videos: [a.mp4]\nfps: 4\n")
    config = load_config(InferenceConfig, file, ["story=fox.yaml"])
    assert (config.story, config.prompts, config.context_videos, config.fps) == ("fox.yaml", [], [], 4)
    with pytest.raises(ValueError, match=r"story=fox\.yaml and prompts exclude each other"):
        load_config(InferenceConfig, file, ["story=fox.yaml", "prompts=[c]"])
    file.write_text("story: fox.yaml\n")
    config = load_config(InferenceConfig, file, ["prompts=[c]"])
    assert (config.story, config.prompts) == (None, ["c"])
    file.write_text("story: fox.yaml\nprompts: [a]\n")
    with pytest.raises(ValueError, match="exclude each other"):
        load_config(InferenceConfig, file)


def test_a_mask_without_the_videos_that_it_asks_for_is_refused(small_model):
    config = InferenceConfig(model=str(small_model), prompts=["a", "b"], scene_mask=[True, False])
    with pytest.raises(ValueError, match="1 scenes are marked as given, but the context videos hold 0"):
        plan_generation(config, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_gives_the_storys_scenes_and_its_record_keeps_the_story_and_repeats_it(
    story, small_model, tmp_path, monkeypatch
):
    path = story(
        Scene(prompt="Actor1 walks.", seed=3),
        Scene(prompt="Actor1 sleeps.", video="sleep.mp4"),
        Scene(prompt="Actor1 wakes."),
    )
    write_video(tmp_path / "told/sleep.mp4", np.full((30, 80, 120, 3), 90, dtype=np.uint8), fps=8)
    monkeypatch.chdir(tmp_path)
    options = {"model": str(small_model), "num_inference_steps": 1, "dtype": "float32", "device": "cpu"}
    output = generate(InferenceConfig(story=path, height=64, width=96, num_frames=9, save_path="out", **options))
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["story"]["scenes"] == [
        {"prompt": "Actor1 walks.", "seed": 3},
        {"prompt": "Actor1 sleeps.", "video": "sleep.mp4"},
        "Actor1 wakes.",
    ]
    assert [bool(scene["context"]) for scene in record["scenes"]] == [False, True, False]
    again = generate(load_config(InferenceConfig, output.with_suffix(".json"), ["save_path=again"]))
    assert again.read_bytes() == output.read_bytes()
    (tmp_path / "told/sleep.json").write_text('{"scenes": [{"frames": [0, 15]}, {"frames": [15, 30]}]}')
    with pytest.raises(ValueError, match="1 scenes are marked as given, but the context videos hold 2"):
        generate(InferenceConfig(story=path, save_path="out", **options))
