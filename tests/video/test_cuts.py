import numpy as np
import pytest

from mask2dit.video.cuts import compare_cuts, detect_cuts
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
