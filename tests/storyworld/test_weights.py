"""The weights in models/storyworld, which the first command of the README uses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mask2dit import Mask2DiTPipeline
from mask2dit.models.loading import select_sampler
from mask2dit.randomness import generator_for
from mask2dit.storyworld.measure import measure_scene
from mask2dit.storyworld.report import measure_video
from mask2dit.storyworld.trial import TASKS, TrialConfig, make_stories, story_of
from mask2dit.storyworld.world import parse_caption
from mask2dit.video.frames import to_uint8

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / "models/storyworld"
# Tuning stories of which everything is right, and the least consistency that they have to keep.
STORIES = {
    "fixed": (100_001, 0.6),
    "extension": (100_005, 0.7),
    "middle": (100_001, 0.8),
    "sliding": (100_001, 0.7),
    "drift": (100_011, 0.7),
}
# Tuning stories whose scene is all right without its context.
CONTROLS = {"no_context": 100_005, "return_no_context": 100_002}
RETURNING = 100_005
# Where scenes are given; and in stories that are longer than the window, as in configs/inference/extension_small.yaml.
INTERVAL = {"guidance_interval": [250, 1000]}
CONTEXT_GUIDANCE = {"context_guidance": True, **INTERVAL}


@pytest.fixture(scope="module")
def pipe():
    pipe = Mask2DiTPipeline.from_pretrained(MODEL)
    pipe.scheduler = select_sampler(pipe.scheduler, "dpm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(pipe, prompts, seed):
    video = pipe(
        prompts,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=10,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
    ).frames[0]
    return np.split(to_uint8(video), len(prompts))


def measured_story(pipe, seed, **settings):
    trial = TrialConfig(split="train", **settings)
    video = make_stories(pipe, trial, [story_of(trial, seed)], [generator_for(trial.seed, seed)])
    return measure_video(trial, seed, to_uint8(video[0]))


def share_of_colours_right(shown, prompts):
    measured = [measure_scene(scene, parse_caption(prompt)).right for scene, prompt in zip(shown, prompts)]
    return np.mean([value for right in measured for value in right["colour"]])


def test_a_story_shows_all_that_its_captions_say_and_nothing_else(pipe):
    actor = "Actor1 (green triangle, wearing a hat)"
    prompts = [
        f"{actor} moves right along the beach.",
        f"{actor} stands still on the beach.",
        f"{actor} moves left along the beach.",
    ]
    for scene, prompt in zip(scenes(pipe, prompts, seed=42), prompts):
        measured = measure_scene(scene, parse_caption(prompt))
        assert measured.all_right, (prompt, measured.right)


def test_the_scenes_of_two_actors_do_not_swap_their_prompts(pipe):
    prompts = [
        "Actor1 (yellow circle) stands still in the snow.",
        "Actor2 (blue square) stands still in the snow.",
        "Actor1 (yellow circle) moves right across the snow.",
    ]
    first, second, third = scenes(pipe, prompts, seed=42)
    assert share_of_colours_right([first, second, third], prompts) == 1
    assert share_of_colours_right([first, second], prompts[1::-1]) == 0


@pytest.mark.parametrize("task", STORIES)
def test_one_story_of_each_task_shows_what_its_captions_say_and_agrees_with_itself(pipe, task):
    seed, consistency = STORIES[task]
    guidance = CONTEXT_GUIDANCE if task in ("sliding", "drift") else INTERVAL if TASKS[task].given else {}
    measured = measured_story(pipe, seed, task=task, **guidance)
    assert measured["right"] == [True] * len(TASKS[task].generated)
    assert measured["consistency"] > consistency


@pytest.mark.parametrize("task", CONTROLS)
def test_a_scene_without_its_context_is_right_and_a_stranger(pipe, task):
    measured = measured_story(pipe, CONTROLS[task], task=task)
    assert measured["right"] == [True]
    assert measured["consistency"] < 0.4


def test_an_actor_that_returns_is_remembered_with_an_anchor_alone(pipe):
    last, anchor = (
        measured_story(pipe, RETURNING, task="return", context=rule, **CONTEXT_GUIDANCE) for rule in ("last", "anchor")
    )
    assert anchor["returned"] > last["returned"] + 0.3


def test_the_folder_is_small():
    size = sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file())
    assert size <= 25e6
