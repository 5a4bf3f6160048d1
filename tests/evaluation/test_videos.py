import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mask2dit.evaluation.config import CutConfig, EvaluationConfig, GenerationConfig
from mask2dit.evaluation.videos import Generator, StoryVideo, equal_boundaries, find_video
from mask2dit.inference import run as inference
from mask2dit.inference.config import InferenceConfig
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.stories import Scene, Story
from mask2dit.video.reading import open_video


def test_scenes_are_the_spans_between_boundaries(story_video):
    assert story_video.scenes == [(0, 9), (9, 18), (18, 27)]
    frames = story_video.frames([0, 9, 18]).float().mean(dim=(1, 2))
    assert frames.argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "boundaries, message",
    [
        ((9,), "has 2 scenes, but the story has 3 prompts"),
        ((9, 27), "27 frames, in which the boundaries .9, 27. do not lie in order"),
        ((18, 9), "do not lie in order"),
        ((0, 9), "do not lie in order"),
    ],
)
def test_boundaries_that_do_not_fit_the_video_are_refused(story_video, boundaries, message):
    with pytest.raises(ValueError, match=message):
        StoryVideo(story=story_video.story, path=story_video.path, boundaries=boundaries)


def test_a_video_needs_a_frame_for_each_scene(story_video):
    many = Story(title="Many", scenes=(Scene(prompt="a"),) * 28)
    with pytest.raises(ValueError, match="27 frames for 28 scenes"):
        StoryVideo(story=many, path=story_video.path, boundaries=tuple(range(1, 28)))


def test_boundaries_are_given_equal_or_detected(story_video, tmp_path):
    story = story_video.story

    def boundaries(how):
        cuts = CutConfig(min_scene_frames=4)
        return find_video(EvaluationConfig(videos=str(tmp_path), boundaries=how, cuts=cuts), story).boundaries

    with pytest.raises(FileNotFoundError, match=r"the-fox\.json.*boundaries=equal"):
        boundaries("given")
    sidecar = story_video.path.with_suffix(".json")
    for bad in ("{}", "[9]", '{"boundaries": ["9"]}', "nothing"):
        sidecar.write_text(bad)
        with pytest.raises(ValueError, match=r"the-fox\.json"):
            boundaries("given")
    sidecar.write_text(json.dumps({"boundaries": [8, 20]}))
    assert boundaries("given") == (8, 20)
    assert boundaries("equal") == boundaries("detected") == (9, 18)
    assert equal_boundaries(49, 3) == [16, 33]


def test_a_video_is_found_by_its_name_with_any_suffix_of_videos(story_video, tmp_path):
    story, config = story_video.story, EvaluationConfig(videos=str(tmp_path), boundaries="equal")
    (tmp_path / "the-fox.txt").write_text("not a video")
    (tmp_path / "the-fox.old.mp4").write_text("another video")
    story_video.path.rename(tmp_path / "the-fox.M4V")
    assert find_video(config, story).path.name == "the-fox.M4V"
    shutil.copy(tmp_path / "the-fox.M4V", tmp_path / "the-fox.mov")
    with pytest.raises(ValueError, match=r"the-fox\.M4V and the-fox\.mov"):
        find_video(config, story)
    for suffix in ("M4V", "mov"):
        (tmp_path / f"the-fox.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=r"the-fox\.mp4"):
        find_video(config, story)


@pytest.fixture
def generator(small_model, tmp_path):
    (tmp_path / "out" / "videos").mkdir(parents=True)

    def make(*stories, **generation) -> Generator:
        settings = {
            "model": str(small_model),
            "height": 64,
            "width": 96,
            "num_frames": 9,
            "num_inference_steps": 1,
            "dtype": "float32",
            **generation,
        }
        config = EvaluationConfig(
            output=str(tmp_path / "out"), generation=GenerationConfig(**settings), device="cpu", seed=1
        )
        return Generator(config, stories)

    return make


def short(title="Short", durations=(None, None)):
    scenes = [Scene(prompt=prompt, seconds=seconds) for prompt, seconds in zip(("a fox", "a lake"), durations)]
    return Story(title=title, scenes=tuple(scenes))


@pytest.mark.parametrize(
    "mode, frames, boundaries",
    [("fixed", 18, (9,)), ("extension", 18, (9,)), ("separate", 18, (9,)), ("merged", 9, (4,))],
)
def test_every_mode_makes_a_video_with_its_boundaries(generator, mode, frames, boundaries):
    video = generator(short(), mode=mode, initial_scenes=1)(short())
    assert (video.reader.num_frames, video.boundaries) == (frames, boundaries)
    record = json.loads(video.path.with_suffix(".json").read_text())
    assert record["made_from"]["mode"] == mode
    assert record["made_from"]["prompts"] == (["a fox a lake"] if mode == "merged" else ["a fox", "a lake"])


def test_durations_become_frames_that_the_vae_carries(generator):
    story = short(durations=(2.0, None))  # 16 frames at 8 fps: 17 is the nearest
    video = generator(story)(story)
    assert (video.boundaries, video.reader.num_frames) == ((17,), 26)


def test_what_was_generated_is_found_again_without_weights(generator, monkeypatch):
    before = generator(short())(short()).path.read_bytes()
    monkeypatch.setattr(Mask2DiTPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    assert generator(short())(short()).path.read_bytes() == before


def test_a_video_of_other_settings_ends_the_run_before_it_starts(generator):
    path = generator(short())(short()).path
    with pytest.raises(ValueError, match=r"short\.mp4 was .* settings: guidance_scale \(6\.0 then, 3\.0 now\);"):
        generator(short(), guidance_scale=3.0)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match=r"short\.json is damaged: delete it"):
        generator(short())


def test_a_setting_that_is_new_makes_videos_stale(generator, monkeypatch):
    generator(short())(short())

    @dataclass(kw_only=True)
    class NewConfig(InferenceConfig):
        strength: float = 0.5

    monkeypatch.setattr("mask2dit.evaluation.config.InferenceConfig", NewConfig)
    with pytest.raises(ValueError, match=r"short\.mp4 .* strength \(None then, 0\.5 now\)"):
        generator(short())


def test_a_storys_own_negative_prompt_and_style_apply_and_given_scenes_are_refused(generator):
    scenes = (Scene(prompt="A fox."), Scene(prompt="A lake."))
    story = Story(title="Own", scenes=scenes, style="watercolour", negative="blurred")
    config = generator(story, negative_prompt="dark")._inference(story)
    assert (config.negative_prompt, config.prompts) == ("blurred", ["A fox. watercolour", "A lake. watercolour"])
    with pytest.raises(ValueError, match="'Given' gives the video of scene 2"):
        generator(Story(title="Given", scenes=(scenes[0], Scene(prompt="A lake.", video="a.mp4"))))


def test_stories_share_one_skeleton_and_one_fingerprint(generator, monkeypatch):
    calls = []
    skeleton, fingerprint = Mask2DiTPipeline.skeleton, inference.fingerprint
    monkeypatch.setattr(
        Mask2DiTPipeline, "skeleton", lambda *args, **options: calls.append("skeleton") or skeleton(*args, **options)
    )
    monkeypatch.setattr(inference, "fingerprint", lambda path: calls.append("fingerprint") or fingerprint(path))
    generator(short("One"), short("Other", durations=(2.0, None)))
    assert sorted(calls) == ["fingerprint", "skeleton"]


def test_the_prompts_of_every_story_are_checked_before_the_first_is_made(generator, small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "world")
    (tmp_path / "world/storyworld.json").write_text('{"num_scenes": 3}')
    known = ("Actor1 (red circle) jumps in the snow.",) * 2
    right = Story(title="Right", scenes=tuple(Scene(prompt=prompt) for prompt in known))
    generator(right, model=str(tmp_path / "world"))
    with pytest.raises(ValueError, match=r"story 'Short': the caption .* is outside the story world"):
        generator(right, short(), model=str(tmp_path / "world"))


def test_stories_have_their_own_noise_and_the_same_in_every_run(generator):
    one, other = short("One"), short("Other")
    make = generator(one, other)
    assert make(one).path.read_bytes() != make(other).path.read_bytes()
    assert make._seed(one) == generator(one)._seed(one) != make._seed(other)


def test_settings_that_the_model_cannot_carry_are_refused_before_weights_are_read(generator, monkeypatch):
    monkeypatch.setattr(Mask2DiTPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="story 'Short': height=70"):
        generator(short(), height=70)
    with pytest.raises(FileNotFoundError, match="no model in"):
        generator(short(), model="nowhere")


def test_videos_are_never_half_written(generator, monkeypatch):
    make = generator(short())
    monkeypatch.setattr(Mask2DiTPipeline, "decode_latents", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(short())
    assert [path.name for path in Path(make.folder).iterdir()] == ["scenes"]
    monkeypatch.undo()
    assert open_video(make(short()).path).num_frames == 18
