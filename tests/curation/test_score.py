import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from mask2dit.curation.config import FilterConfig, ScoreConfig
from mask2dit.curation.score import Scores, apply_filters, motion_and_shake, score, score_settings
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
        ({"max_subtitles": 0.4}, "subtitles"),
        ({"min_aesthetic": 5.0}, "low_aesthetic"),
        ({"min_short_side": 64, "min_motion": 2.0, "max_shake": 1.0, "max_text": 0.2, "min_aesthetic": 4.5}, None),
    ],
)
def test_each_limit_drops_what_lies_beyond_it(limits, rule):
    scores = Scores(id="a", source="a", short_side=64, motion=2.0, shake=1.0, text=0.2, subtitles=0.5, aesthetic=4.5)
    [(_, [result])] = apply_filters([scores], FilterConfig(**limits))
    assert getattr(result, "rule", None) == rule
    if isinstance(result, Dropped):
        assert "is above" in result.why or "is below" in result.why


def test_the_documentation_names_the_rule_of_every_limit():
    scores = Scores(id="a", source="a", short_side=1, motion=1.0, shake=1.0, text=1.0, subtitles=1.0, aesthetic=1.0)
    limits = [{field.name: 2 if field.name.startswith("min") else 0} for field in fields(FilterConfig)]
    rules = {entry.rule for limit in limits for _, [entry] in apply_filters([scores], FilterConfig(**limit))}
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^\| `filter` \|.*\|(.*)\|$", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == rules


def test_clips_are_scored_for_what_is_asked_only(story):
    _, clips, folder = story
    results = [entry for _, [entry] in score(clips.values(), (None, None), folder, ScoreConfig(motion=True))]
    assert [entry.id for entry in results] == list(clips)
    assert (results[0].short_side, results[0].motion, results[0].text, results[0].aesthetic) == (64, 0, None, None)


def test_weights_that_are_missing_are_named():
    with pytest.raises(FileNotFoundError, match=r"score\.clip: there is nothing at 'nowhere'"):
        score_settings(ScoreConfig(clip="nowhere", aesthetic_head="nowhere"))
