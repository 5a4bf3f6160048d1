import json

import pytest

from mask2dit.curation.answers import PROMPT_VERSION, check_captions, instructions, parse_answer

FOX = "a red fox, wearing a blue scarf"
OWL = "a grey owl with round glasses"
GOOD = [
    f"Actor1 ({FOX}) stands in a snowy forest. Actor1 sniffs the air.",
    f"Actor1 ({FOX}) and Actor2 ({OWL}) meet on a wooden bridge. Actor2 waves at Actor1.",
]


def answer(actors=((("Actor1"), FOX), ("Actor2", OWL)), captions=GOOD):
    return json.dumps(
        {
            "actors": [{"name": name, "appearance": text} for name, text in actors],
            "scenes": [{"caption": caption} for caption in captions],
        }
    )


def test_a_good_answer_is_read_within_a_block_of_code_too():
    for text in (answer(), f"Here it is:\n```json\n{answer()}\n```"):
        found = parse_answer(text, 2, 150)
        assert found.actors == {"Actor1": FOX, "Actor2": OWL}
        assert found.captions == GOOD


def test_scenes_without_actors_are_fine():
    assert parse_answer(answer([], ["Rain falls on an empty street."]), 1, 150).actors == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("I cannot help with that.", "holds no JSON object"),
        ('{"actors": [}', "is not valid JSON"),
        ('{"scenes": []}', '"actors" has to be a list of objects'),
        ('{"actors": [], "scenes": ["one"]}', '"scenes" has to be a list of objects'),
        (answer(captions=GOOD[:1]), "there are 2 scenes, but 1 captions"),
        (answer(captions=[*GOOD, GOOD[0]]), "there are 2 scenes, but 3 captions"),
        (answer([("Actor1", FOX)]), "scene 2 mentions Actor2, who is not declared"),
        (answer([("Actor1", FOX), ("Actor1", OWL)]), "Actor1 is declared twice"),
        (answer([("The fox", FOX), ("Actor2", OWL)]), "actors are named Actor1, Actor2, …, but one is 'The fox'"),
        (answer([("Actor1", "a fox (red)"), ("Actor2", OWL)]), "without parentheses"),
        (answer([("Actor1", FOX), ("Actor2", OWL), ("Actor3", "a hare")]), "Actor3 is declared, but is in no caption"),
        (
            answer(captions=[GOOD[0].replace("blue", "green"), GOOD[1]]),
            "first mention of Actor1 has to be 'Actor1 .a red",
        ),
        (answer(captions=[f"{GOOD[0]} Actor1 (a wet fox) leaves.", GOOD[1]]), "describes Actor1 in other words"),
        (answer(captions=["Half a cake \ud83c.", GOOD[1]]), "surrogate"),
        (answer(captions=["", GOOD[1]]), "caption of scene 1 is empty"),
        (answer(captions=[f"The video shows {GOOD[0]}", GOOD[1]]), "begins with 'The video shows'"),
        (answer(captions=[f"In this scene, {GOOD[0]}", GOOD[1]]), "begins with 'In this scene'"),
        (answer(captions=[f"We see {GOOD[0]}", GOOD[1]]), "begins with 'We see'"),
        (answer(captions=[GOOD[0][:-1], GOOD[1]]), "does not end with a complete sentence"),
        (answer(captions=[GOOD[0] + " It snows." * 80, GOOD[1]]), "has 177 words, but at most 150 fit"),
    ],
)
def test_a_bad_answer_is_refused_with_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_answer(text, 2, 150)


def test_what_is_filmed_may_be_a_film():
    check_captions({}, ["A film crew waits on a beach.", "The scene shop is full of painted walls."], 150)


def test_the_tenth_actor_is_not_the_first():
    actors = {"Actor1": FOX, "Actor10": OWL}
    check_captions(actors, [f"Actor10 ({OWL}) sits in a tree above Actor1 ({FOX})."], 150)
    with pytest.raises(ValueError, match="Actor1 is declared, but is in no caption"):
        check_captions(actors, [f"Actor10 ({OWL}) sits in a tree."], 150)


def test_instructions_ask_for_as_many_captions_as_scenes():
    assert "3 consecutive scenes" in instructions(3, 90) and "3 captions" in instructions(3, 90)
    assert "at most 90 words" in instructions(1, 90) and "one caption under" in instructions(1, 90)
    assert PROMPT_VERSION.startswith("1-")


def test_edited_captions_are_texts_that_a_manifest_can_hold():
    with pytest.raises(ValueError, match="caption of scene 1 holds half"):
        check_captions({}, ["Half a cake \ud83c."], 150)
