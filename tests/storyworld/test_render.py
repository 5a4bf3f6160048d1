import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from mask2dit.storyworld.render import actor_layers, hsv_to_rgb, render_scene
from mask2dit.storyworld.world import ACCESSORIES, COLOURS, HUES, IDENTITY_RANGES, SHAPES, sample_story


def test_a_scene_is_a_video_of_the_size_asked_for():
    video = render_scene(sample_story(0), 1, num_frames=17, height=96, width=128)
    assert video.shape == (17, 96, 128, 3) and video.dtype == np.uint8


def test_rendering_gives_the_same_pixels_each_time():
    assert np.array_equal(render_scene(sample_story(0), 2), render_scene(sample_story(0), 2))


def test_scenes_of_a_larger_size_show_the_same():
    story = sample_story(4)
    large = render_scene(story, 0, height=128, width=128).reshape(9, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(large - render_scene(story, 0)).mean() < 2


def test_colours_stay_apart_at_any_hidden_hue():
    low, high = IDENTITY_RANGES["hues"]
    hues = sorted(HUES[colour] for colour in COLOURS)
    gaps = np.diff([*hues, hues[0] + 360])
    assert gaps.min() >= 2 * (high - low)


def test_hues_are_those_of_hsv():
    import colorsys

    for hue in (-30, 0, 54, 130, 214, 284, 350, 400):
        assert hsv_to_rgb(hue, 0.8, 0.9) == pytest.approx(colorsys.hsv_to_rgb(hue % 360 / 360, 0.8, 0.9))


def test_only_actors_are_saturated():
    for seed in range(30):
        story = sample_story(seed)
        nobody = dataclasses.replace(story.scenes[0], present=(), actions=(), starts=())
        empty = render_scene(dataclasses.replace(story, scenes=(nobody,), identities=story.identities[:1]), 0)
        assert np.ptp(empty.astype(int), axis=-1).max() < 0.35 * 255
        assert np.ptp(render_scene(story, 0).astype(int), axis=-1).max() > 0.6 * 255


def test_actors_never_touch():
    for seed in range(60):
        story = sample_story(seed)
        for k, scene in enumerate(story.scenes):
            chroma = np.ptp(render_scene(story, k).astype(int), axis=-1)
            columns = (chroma > 110).any(1)  # (F, W)
            runs = (np.diff(np.pad(columns, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1)
            assert (runs == len(scene.present)).all()


def test_every_cut_moves_the_whole_background():
    for seed in range(30):
        scenes = [render_scene(sample_story(seed), k) for k in range(3)]
        for before, after in pairwise(scenes):
            assert np.abs(before[-1, -4:].astype(int) - after[0, -4:]).mean() > 5  # below all actors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_drawings_differ_from_each_other(shape, accessory):
    x, y = np.arange(-20, 20)[None] + 0.5, np.arange(-2, 38)[:, None] + 0.5

    def drawing(*look):
        return np.stack(actor_layers(*look, 20.0, x, y))

    own = drawing(shape, accessory)
    assert own.min() >= 0 and own.sum(0).max() <= 1 + 1e-9
    others = [(a, b) for a in SHAPES for b in ACCESSORIES if (a, b) != (shape, accessory)]
    assert min(np.abs(own - drawing(*other)).sum() for other in others) > 25  # pixels


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 1}, "at least 2 frames"),
        ({"height": 16}, "at least 32 high"),
        ({"height": 96, "width": 64}, "96x64"),
    ],
)
def test_sizes_that_show_nothing_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        render_scene(sample_story(0), 0, **size)


def test_a_scene_that_there_is_not_is_refused():
    with pytest.raises(IndexError):
        render_scene(sample_story(0), 3)
