import struct

import numpy as np
import pytest

from mask2dit.curation.config import FilterConfig, ScoreConfig
from mask2dit.curation.score import Scores, TextDetector, apply_filters, motion_and_shake, score, score_settings
from mask2dit.curation.store import Dropped
from mask2dit.video.reading import ArrayReader


def moving(shifts):
    """A picture moved sideways by so many pixels from frame to frame, 160 pixels wide and 10 frames a second."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 40, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    lefts = np.cumsum([40, *shifts])
    return ArrayReader(np.stack([picture[:, left : left + 160] for left in lefts]), fps=10)


def test_motion_is_measured_in_percent_of_the_width_a_second():
    motion, shake = motion_and_shake(moving([2] * 30))
    assert motion == pytest.approx(100 * 2 * 10 / 160, rel=0.2)
    assert shake < 0.1 * motion


def test_a_still_clip_has_none():
    assert motion_and_shake(moving([0] * 30)) == pytest.approx((0, 0), abs=0.01)


def test_a_shaking_camera_is_told_from_a_steady_one():
    _, shake = motion_and_shake(moving([3, -3] * 15))
    assert shake == pytest.approx(100 * 6 * 10 / 160, rel=0.3)


@pytest.mark.parametrize(
    "limits, rule",
    [
        ({}, None),
        ({"min_short_side": 65}, "low_resolution"),
        ({"min_motion": 2.5}, "too_still"),
        ({"max_shake": 0.5}, "too_shaky"),
        ({"max_text": 0.1}, "text"),
        ({"min_aesthetic": 5.0}, "low_aesthetic"),
        ({"min_short_side": 64, "min_motion": 2.0, "max_shake": 1.0, "max_text": 0.2, "min_aesthetic": 4.5}, None),
    ],
)
def test_each_limit_drops_what_lies_beyond_it(limits, rule):
    scores = Scores(id="a", source="a", short_side=64, motion=2.0, shake=1.0, text=0.2, aesthetic=4.5)
    [(_, [result])] = apply_filters([scores], FilterConfig(**limits))
    assert getattr(result, "rule", None) == rule
    if isinstance(result, Dropped):
        assert "is above" in result.why or "is below" in result.why


def test_clips_are_scored_for_what_is_asked_only(story):
    _, clips, folder = story
    results = [entry for _, [entry] in score(clips.values(), (None, None), folder, ScoreConfig(motion=True))]
    assert [entry.id for entry in results] == list(clips)
    assert (results[0].short_side, results[0].motion, results[0].text, results[0].aesthetic) == (64, 0, None, None)


def test_weights_that_are_missing_are_named():
    with pytest.raises(FileNotFoundError, match=r"score\.text_detector: there is nothing at 'nowhere\.onnx'"):
        score_settings(ScoreConfig(text_detector="nowhere.onnx"))


def onnx_detector(path):
    """A network in ONNX, written byte by byte, which takes what is bright for text: sigmoid(20 (r + g + b) - 10)."""

    def field(number, content):
        if isinstance(content, int):
            return bytes([number << 3, content])
        content = content.encode() if isinstance(content, str) else content
        return bytes([number << 3 | 2]) + (bytes([len(content) & 127 | 128, len(content) >> 7])) + content

    def tensor(name, dims, values):
        raw = struct.pack(f"<{len(values)}f", *values)
        return b"".join(field(1, dim) for dim in dims) + field(2, 1) + field(8, name) + field(9, raw)

    def value(name, *dims):
        shape = b"".join(field(1, field(1, dim)) for dim in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    convolution = field(1, "x") + field(1, "w") + field(1, "b") + field(2, "y") + field(4, "Conv")
    sigmoid = field(1, "y") + field(2, "z") + field(4, "Sigmoid")
    weights = field(5, tensor("w", (1, 3, 1, 1), [20.0] * 3)) + field(5, tensor("b", (1,), [-10.0]))
    graph = field(1, convolution) + field(1, sigmoid) + field(2, "g") + weights
    graph += field(11, value("x", 1, 3)) + field(12, value("z", 1, 1))
    path.write_bytes(field(1, 8) + field(8, field(1, "") + field(2, 13)) + field(7, graph))
    return path


def test_the_share_of_text_is_that_of_the_frame_with_the_most(tmp_path):
    detect = TextDetector(str(onnx_detector(tmp_path / "bright.onnx")))
    frames = np.zeros((3, 128, 192, 3), np.uint8)
    assert detect(frames) == 0
    frames[1, 40:80, 48:144] = 255
    assert detect(frames) == pytest.approx(40 * 96 / (128 * 192), rel=0.03)


def test_what_is_no_text_detector_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a network in ONNX that OpenCV can read"):
        TextDetector(str(tmp_path / "bad.onnx"))
