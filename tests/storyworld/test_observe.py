from dataclasses import replace

import numpy as np
import pytest

from mask2dit.storyworld.observe import find_cuts, observe_scene
from mask2dit.storyworld.render import (
    PALETTES,
    actor_size,
    render_scene,
    render_story,
    stripe_wavelength,
    tinted,
)
from mask2dit.storyworld.world import HUES, hue_distance, sample_story

STORIES = [sample_story(seed) for seed in range(15)]


def test_each_frame_shows_the_actors_from_left_to_right_as_they_are():
    for story in STORIES:
        present = story.scenes[0].present
        for bodies in observe_scene(render_scene(story, 0)).bodies:
            assert len(bodies) == len(present)
            for body, index in zip(bodies, present):
                actor, identity = story.actors[index], story.identities[0]
                assert (body.shape, body.colour, body.accessory) == (actor.shape, actor.colour, actor.accessory)
                assert hue_distance(body.hue, HUES[actor.colour] + identity.hues[index]) < 1
                size = actor_size(len(story.actors), identity.sizes[index])
                assert body.size == pytest.approx(size, rel=0.04)


def test_positions_are_where_actors_are_drawn():
    story = STORIES[1]
    scene = replace(story.scenes[0], actions=("stands still",), starts=(0.5,), present=(0,))
    bodies = observe_scene(render_scene(replace(story, scenes=(scene,), identities=story.identities[:1]), 0)).bodies
    assert bodies[0][0].x == pytest.approx(32, abs=0.2)
    assert bodies[0][0].floor == pytest.approx(0.9 * 64, abs=0.3)


def test_the_background_is_read_behind_the_actors():
    for story in STORIES:
        background, identity = observe_scene(render_scene(story, 0)).background, story.identities[0]
        above, at_horizon, ground = tinted(PALETTES[story.setting], identity)
        assert background.horizon == pytest.approx(identity.horizon, abs=0.01)
        assert background.sky == pytest.approx((above + at_horizon) / 2, abs=0.03)
        assert background.ground == pytest.approx(ground, abs=0.03)
        assert background.stripe_angle == pytest.approx(identity.stripe_angle, abs=2)
        wavelength = stripe_wavelength(identity.stripe_wavelength)
        assert background.stripe_wavelength == pytest.approx(wavelength, rel=0.03)


def test_lengths_are_the_same_at_any_size():
    small, large = (observe_scene(render_scene(STORIES[4], 0, height=h, width=h)) for h in (64, 128))
    for a, b in zip(small.bodies[3], large.bodies[3]):
        assert a.size == pytest.approx(b.size, rel=0.03)
        assert (a.x, a.floor) == pytest.approx((b.x, b.floor), abs=0.3)
    assert small.background.stripe_wavelength == pytest.approx(large.background.stripe_wavelength, rel=0.02)


def test_a_blob_is_a_body_that_looks_like_no_drawing():
    video = np.full((3, 64, 64, 3), 200, np.uint8)
    video[:, 20:44, 10:16] = video[:, 20:26, 10:50] = (220, 30, 30)
    body = observe_scene(video).bodies[0][0]
    assert body.colour == "red"
    assert body.shape is None and body.accessory is None


def test_narrow_strips_side_by_side_are_no_drawings():
    video = np.full((3, 64, 64, 3), 200, np.uint8)
    video[:, :, ::2] = (220, 30, 30)
    bodies = observe_scene(video).bodies[0]
    assert len(bodies) == 32 and all(body.shape is None for body in bodies)


def test_specks_are_no_actors():
    video = render_scene(STORIES[1], 0)
    count = len(observe_scene(video).bodies[0])
    video[:, 3:6, 3:6] = (255, 0, 0)
    assert len(observe_scene(video).bodies[0]) == count


def test_a_plain_frame_has_no_horizon():
    observation = observe_scene(np.full((3, 64, 64, 3), 128, np.uint8))
    assert observation.background is None and observation.bodies == ((), (), ())


def test_a_ground_without_stripes_has_none():
    video = np.full((3, 64, 64, 3), 200, np.uint8)
    video[:, 40:] = (120, 140, 110)
    background = observe_scene(video).background
    assert background.horizon == pytest.approx(40 / 64, abs=0.002)
    assert background.stripe_angle is None and background.stripe_wavelength is None


def test_cuts_are_found_where_scenes_begin():
    for story in STORIES:
        assert find_cuts(np.concatenate(render_story(story))) == (9, 18)


def test_motion_is_no_cut():
    for story in STORIES:
        assert find_cuts(render_scene(story, 0, num_frames=18)) == ()
