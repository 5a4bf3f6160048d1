import json

import pytest

from mask2dit.storyworld.prompts import MARKER, check_prompts

CAPTION = "Actor1 (red circle, wearing a hat) jumps in the snow."


@pytest.fixture
def model(tmp_path):
    (tmp_path / MARKER).write_text(json.dumps({"num_scenes": 3}))
    return tmp_path


def test_captions_of_the_world_pass(model):
    check_prompts(model, [CAPTION] * 3, None)
    check_prompts(model, [CAPTION] * 8, 3)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("A cat sleeps.", "one of across the desert"),
        (CAPTION.replace("red", "orange"), "'orange' is no colour of Actor1; there are red, yellow"),
        ("Actor1 (red circle) jumps, " * 3 + "Actor4 (blue square) jumps in the snow.", "4 actors, .* at most 3"),
    ],
)
def test_what_the_world_does_not_have_is_refused_with_what_it_has(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(model, [CAPTION, prompt], None)


def test_more_scenes_at_once_than_in_training_are_refused(model):
    with pytest.raises(ValueError, match=r"4 scenes at once are more than the 3 .* set window=3"):
        check_prompts(model, [CAPTION] * 4, None)


def test_other_models_may_be_asked_for_anything(tmp_path):
    check_prompts(tmp_path, ["A cat sleeps."] * 5, None)
