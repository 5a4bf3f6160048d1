from dataclasses import replace

import numpy as np
import pytest

from mask2dit.storyworld.render import render_scene
from mask2dit.storyworld.trial import (
    RECORD,
    TASKS,
    TrialConfig,
    read_record,
    returning_actors,
    run_trial,
    story_of,
    story_seeds,
    windows,
)
from mask2dit.storyworld.world import sample_story
from mask2dit.video.reading import open_video

pytestmark = pytest.mark.slow


@pytest.fixture
def config(small_model, tmp_path):
    def make(**changes) -> TrialConfig:
        values = {
            "model": str(small_model),
            "output_dir": str(tmp_path / "trial"),
            "num_stories": 2,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
        }
        return TrialConfig(**{**values, **changes})

    return make


def frames(config, number):
    video = open_video(f"{config.output_dir}/{story_seeds(config)[number]:06d}.mp4")
    return video.read(range(video.num_frames))


@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"drift"}))  # drift is sliding for longer
def test_every_task_writes_all_scenes_of_each_story(config, task):
    trial = config(task=task)
    run_trial(trial)
    assert [len(frames(trial, number)) for number in range(2)] == [9 * TASKS[task].num_scenes] * 2


def test_the_window_slides_one_scene_at_a_time():
    def calls(task):
        return windows(TrialConfig(task=task), sample_story(0, TASKS[task].num_scenes))

    assert calls("sliding")[:2] == (((0, 1, 2), (2,)), ((1, 2, 3), (3,)))
    assert len(calls("sliding")) == 6
    assert calls("middle") == (((0, 1, 2), (1,)),)
    assert calls("no_context") == (((2,), (2,)),)


def test_an_actor_of_the_first_scene_is_absent_until_it_returns_in_the_last():
    for seed in range(3):
        story = story_of(TrialConfig(task="return", split="train"), seed)
        returned = returning_actors(story)
        assert returned
        present = [[k in scene.present for scene in story.scenes] for k in returned]
        assert present == [[True, False, False, True]] * len(returned)


@pytest.mark.parametrize("context, seen", [("last", (1, 2, 3)), ("anchor", (0, 2, 3)), ("cast", (0, 2, 3))])
def test_the_scene_that_shows_the_returning_actor_is_seen_with_anchor_and_cast(context, seen):
    trial = TrialConfig(task="return", context=context)
    assert windows(trial, story_of(trial, 0)) == ((seen, (3,)),)


def test_an_interrupted_trial_goes_on_with_the_same_stories(config, tmp_path):
    whole, parts = (config(output_dir=str(tmp_path / name), batch_size=1) for name in ("whole", "parts"))
    run_trial(whole)
    run_trial(replace(parts, num_stories=1))
    run_trial(parts)
    for number in range(2):
        assert np.array_equal(frames(parts, number), frames(whole, number))


def test_the_context_is_the_rendered_scene_through_the_vae(config, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "mask2dit.storyworld.trial.render_scene",
        lambda story, k, *size: shown.append((story, k)) or render_scene(story, k, *size),
    )
    run_trial(config(task="middle", num_stories=1))
    story = sample_story(story_seeds(config())[0], 3, "held_out")
    assert shown == [(story, 0), (story, 2)]


def test_a_folder_holds_one_trial(config):
    run_trial(config(num_stories=1))
    with pytest.raises(FileExistsError, match=r"another trial: seed \(0 then, 1 now\)"):
        run_trial(config(seed=1))


@pytest.mark.parametrize(
    "name, possible",
    [
        ("task", "fixed, .*sliding, .*"),
        ("split", "train, held_out"),
        ("stories", "tuning, reporting"),
        ("sampler", "ddim, dpm"),
        ("dtype", "float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice_is_refused(name, possible):
    with pytest.raises(ValueError, match=rf"{name} has to be one of {possible}, but is 'unknown'"):
        TrialConfig(**{name: "unknown"})


@pytest.mark.parametrize("content", ["{", "{}", '{"config": {"removed_key": 1}}', '{"config": {"task": "unknown"}}'])
def test_a_record_that_is_not_one_of_a_trial_is_named(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=rf"{RECORD} is .*make it again"):
        read_record(tmp_path)


@pytest.mark.parametrize("task, differs", [("extension", True), ("fixed", False)])
def test_context_guidance_changes_scenes_that_follow_given_ones_alone(config, tmp_path, task, differs):
    videos = []
    for name, context_guidance in (("plain", False), ("context", True)):
        trial = config(
            task=task,
            num_stories=1,
            guidance_scale=9.0,
            context_guidance=context_guidance,
            output_dir=str(tmp_path / name),
        )
        run_trial(trial)
        videos.append(frames(trial, 0))
    assert (not np.array_equal(*videos)) == differs
