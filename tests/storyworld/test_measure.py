from dataclasses import replace

import numpy as np
import pytest

from mask2dit.storyworld.measure import measure_scene, measure_story, visual_consistency
from mask2dit.storyworld.render import render_scene, render_story
from mask2dit.storyworld.world import (
    Actor,
    Identity,
    Scene,
    Story,
    caption,
    describe,
    sample_story,
    with_new_identity,
)

IDENTITY = Identity(
    hues=(5.0, -5.0),
    sizes=(0.05, -0.05),
    horizon=0.6,
    sky_warmth=0.02,
    sky_brightness=0.02,
    ground_warmth=-0.02,
    ground_brightness=0.02,
    stripe_angle=30.0,
    stripe_wavelength=0.1,
)
PAIR = (
    Actor(shape="circle", colour="red", accessory="hat"),
    Actor(shape="square", colour="blue", accessory="none"),
)


def story_with(actors=PAIR, actions=("moves right", "jumps"), setting="desert", num_scenes=1):
    """A story of two actors who do the same in each scene."""
    scenes = [Scene(present=(0, 1), actions=actions, starts=(0.3, 0.6), camera=0.4 * k % 1) for k in range(num_scenes)]
    return Story(actors=actors, setting=setting, scenes=tuple(scenes), identities=(IDENTITY,) * num_scenes)


def captions_of(story):
    return [caption(story, k) for k in range(len(story.scenes))]


def wrong_kinds(measured):
    return {kind for kind, values in measured.right.items() if not all(values)}


def noise_video(frames=9):
    return np.random.default_rng(0).integers(256, size=(frames, 64, 64, 3), dtype=np.uint8)


def grey_video(frames=9):
    return np.full((frames, 64, 64, 3), 128, np.uint8)


@pytest.mark.parametrize(("height", "width", "num_frames"), [(64, 64, 9), (96, 128, 17)])
def test_rendered_stories_are_read_as_they_were_drawn(height, width, num_frames):
    for seed in range(12 if height == 64 else 4):
        story = sample_story(seed)
        video = np.concatenate(render_story(story, num_frames, height, width))
        measured = measure_story(video, captions_of(story))
        assert all(scene.all_right and scene.share_right == 1 for scene in measured.scenes)
        assert measured.cuts_right
        for consistency in (measured.consistency, measured.adjacent, measured.first_to_last):
            assert consistency.overall > 0.95
        assert max(measured.drift) < 0.05 and len(measured.drift) == 3


WRONG = {
    "colour": story_with((replace(PAIR[0], colour="green"), PAIR[1])),
    "shape": story_with((PAIR[0], replace(PAIR[1], shape="triangle"))),
    "accessory": story_with((replace(PAIR[0], accessory="scarf"), PAIR[1])),
    "action": story_with(actions=("moves right", "stands still")),
    "setting": story_with(setting="beach"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_drawn_wrong_is_wrong_and_nothing_else(kind):
    measured = measure_scene(render_scene(WRONG[kind], 0), describe(story_with(), 0))
    assert wrong_kinds(measured) == {kind}
    assert sum(measured.right[kind]) == len(measured.right[kind]) - 1
    assert measured.share_right == pytest.approx(9 / 10)


@pytest.mark.parametrize("drawn", [("moves left", "moves right"), ("stands still", "moves left")])
def test_a_joint_action_needs_both_to_do_their_part(drawn):
    together = story_with(actions=("move towards each other",) * 2)
    right = measure_scene(render_scene(together, 0), describe(together, 0))
    assert right.all_right and right.right["joint"] == (True,) and "action" not in right.right
    measured = measure_scene(render_scene(story_with(actions=drawn), 0), describe(together, 0))
    assert wrong_kinds(measured) == {"joint"}


def test_two_actors_that_swap_places_have_each_others_looks():
    measured = measure_scene(render_scene(story_with(PAIR[::-1]), 0), describe(story_with(), 0))
    assert measured.right["colour"] == measured.right["shape"] == measured.right["accessory"] == (False, False)
    assert measured.right["cast"] == (True,)


def test_an_actor_that_vanishes_half_way_is_not_there():
    story = story_with()
    video = render_scene(story, 0)
    alone = replace(story.scenes[0], present=(0,), actions=("moves right",), starts=(0.0,))
    video[5:] = render_scene(replace(story, scenes=(alone,)), 0)[5:]
    measured = measure_scene(video, describe(story, 0))
    assert measured.right["cast"] == (False,)
    assert {kind: measured.right[kind][1] for kind in ("colour", "shape", "accessory", "action")} == dict.fromkeys(
        ("colour", "shape", "accessory", "action"), False
    )
    assert measured.right["colour"][0] and measured.right["shape"][0]


def test_one_actor_too_many_makes_the_cast_wrong_and_leaves_the_others_right():
    described = story_with((PAIR[1],), actions=("jumps",))
    described = replace(described, scenes=(replace(described.scenes[0], present=(0,), starts=(0.6,)),))
    measured = measure_scene(render_scene(story_with(), 0), describe(described, 0))
    assert wrong_kinds(measured) == {"cast"}


@pytest.mark.parametrize("video", [noise_video(), grey_video()], ids=["noise", "grey"])
def test_a_video_of_nothing_has_nothing_right_and_agrees_with_nothing(video):
    story = story_with()
    measured = measure_scene(video, describe(story, 0))
    assert measured.share_right == 0
    assert visual_consistency([measured, measured]).overall == 0
    drawn = measure_scene(render_scene(story, 0), describe(story, 0))
    assert visual_consistency([drawn, measured]).overall == 0


@pytest.mark.slow
def test_blur_and_noise_as_of_a_vae_change_little():
    from mask2dit.storyworld.validate import ValidateConfig, validate

    result = validate(ValidateConfig(num_stories=8, blur=1, noise=4))
    assert result["right"]["all"] >= 0.98
    assert result["consistency"] > 0.9 and result["cuts_right"] == 1


@pytest.mark.slow
def test_unrelated_stories_have_no_consistency_on_average():
    found = []
    for seed in range(60):
        story = sample_story(seed, num_scenes=1)
        other = with_new_identity(story, seed)
        pair = [measure_scene(render_scene(one, 0), describe(one, 0)) for one in (story, other)]
        found.append(visual_consistency(pair).overall)
    assert np.mean(found) == pytest.approx(0, abs=0.12)  # the standard error is 0.04


@pytest.mark.parametrize(
    ("field", "value", "group"),
    [
        ("hues", (-9.0, -5.0), "hue"),
        ("sizes", (-0.1, -0.05), "size"),
        ("horizon", 0.7, "horizon"),
        ("sky_warmth", -0.05, "sky"),
        ("ground_brightness", -0.04, "ground"),
        ("stripe_angle", -30.0, "stripes"),
    ],
)
def test_what_changes_in_identity_shows_in_its_group_alone(field, value, group):
    story = story_with(num_scenes=2)
    story = replace(story, identities=(IDENTITY, replace(IDENTITY, **{field: value})))
    measured = measure_story(np.concatenate(render_story(story)), captions_of(story))
    assert measured.consistency.by_group[group] < 0.6
    assert min(value for name, value in measured.consistency.by_group.items() if name != group) > 0.9


def test_an_actor_that_only_one_caption_names_is_compared_with_none():
    story = story_with(num_scenes=2)
    alone = replace(story.scenes[1], present=(1,), actions=("jumps",), starts=(0.5,))
    other = replace(story.scenes[1], present=(0,), actions=("jumps",), starts=(0.5,))
    story = replace(story, scenes=(story.scenes[0], other, alone), identities=(IDENTITY,) * 3)
    scenes = [measure_scene(render_scene(story, k), describe(story, k)) for k in range(3)]
    assert visual_consistency(scenes, [(0, 2)]).by_group["hue"] > 0.95
    assert "hue" not in visual_consistency(scenes, [(1, 2)]).by_group


def test_drift_is_the_distance_of_each_scene_to_the_first():
    story = sample_story(8, num_scenes=4)
    far = with_new_identity(story, 3).identities[0]
    story = replace(story, identities=(*story.identities[:2], far, far))
    drift = measure_story(np.concatenate(render_story(story)), captions_of(story)).drift
    assert drift[0] == 0 and drift[1] < 0.05
    assert drift[2] > 0.3 and drift[3] > 0.3


def test_a_cut_in_the_wrong_place_is_both_missing_and_extra():
    story = story_with(num_scenes=2)
    measured = measure_story(np.concatenate(render_story(story)), captions_of(story), num_frames=[6, 12])
    assert measured.missing_cuts == (6,) and measured.extra_cuts == (9,)
    assert not measured.cuts_right


def test_one_scene_that_goes_on_has_no_cut():
    story = story_with()
    measured = measure_story(render_scene(story, 0, num_frames=18), captions_of(story) * 2)
    assert measured.missing_cuts == (9,) and not measured.extra_cuts


@pytest.mark.parametrize(
    ("video", "captions", "num_frames", "message"),
    [
        (grey_video(18) / 255, 2, None, "uint8"),
        (grey_video(18)[0], 2, None, "uint8"),
        (grey_video(18)[:, :16], 2, None, "at least 32 high"),
        (grey_video(18), 1, None, "at least 2 scenes, but there are 1 captions"),
        (grey_video(19), 2, None, "19 frames do not divide into 2 equal scenes"),
        (grey_video(18), 2, 8, "18 frames, but 2 captions with num_frames=8 take 16"),
        (grey_video(18), 2, [9], "18 frames, but 2 captions"),
    ],
)
def test_videos_that_are_no_stories_are_refused(video, captions, num_frames, message):
    with pytest.raises(ValueError, match=message):
        measure_story(video, captions_of(story_with()) * captions, num_frames)


def test_a_caption_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="'fox' is no"):
        measure_story(grey_video(18), ["Actor1 (red fox) jumps in the snow."] * 2)
