import dataclasses
import re
from itertools import combinations, product

import pytest

from mask2dit.storyworld.world import (
    ACCESSORIES,
    ACTIONS,
    COLOURS,
    HELD_OUT_ACTIONS,
    HELD_OUT_LOOKS,
    IDENTITY_RANGES,
    JOINT_ACTIONS,
    SETTINGS,
    SHAPES,
    UNNAMED,
    DescribedActor,
    Description,
    caption,
    describe,
    hue_distance,
    is_held_out,
    nearest_colour,
    parse_caption,
    sample_story,
    with_new_identity,
    write_caption,
)

TRAIN = [sample_story(seed) for seed in range(300)]
HELD_OUT = [sample_story(seed, split="held_out") for seed in range(300)]


def looks_of(stories):
    return {(actor.shape, actor.colour) for story in stories for actor in story.actors}


def actions_of(stories):
    return {(action, story.setting) for story in stories for scene in story.scenes for action in scene.actions}


def test_a_story_depends_on_its_arguments_alone():
    assert sample_story(3, 4, "held_out") == sample_story(3, 4, "held_out")
    assert len({sample_story(seed) for seed in range(20)}) == 20
    assert sample_story(3) != sample_story(3, split="held_out")


def test_training_stories_lack_the_held_out_combinations_but_no_word():
    assert not looks_of(TRAIN) & HELD_OUT_LOOKS
    assert not actions_of(TRAIN) & HELD_OUT_ACTIONS
    assert looks_of(TRAIN) | HELD_OUT_LOOKS == set(product(SHAPES, COLOURS))
    assert {(action, setting) for action, setting in actions_of(TRAIN) if action in ACTIONS} | HELD_OUT_ACTIONS == set(
        product(ACTIONS, SETTINGS)
    )
    assert {actor.accessory for story in TRAIN for actor in story.actors} == set(ACCESSORIES)
    assert {action for action, _ in actions_of(TRAIN)} >= set(JOINT_ACTIONS)


def test_every_held_out_story_has_a_combination_that_training_lacks():
    assert all(map(is_held_out, HELD_OUT))
    assert looks_of(HELD_OUT) >= HELD_OUT_LOOKS
    assert actions_of(HELD_OUT) >= HELD_OUT_ACTIONS


@pytest.mark.parametrize("num_scenes", [1, 3, 8])
def test_a_story_has_a_cast_of_different_colours_all_of_whom_appear(num_scenes):
    for seed in range(50):
        story = sample_story(seed, num_scenes)
        assert len(story.scenes) == len(story.identities) == num_scenes
        assert len({actor.colour for actor in story.actors}) == len(story.actors) in (1, 2, 3)
        assert {index for scene in story.scenes for index in scene.present} == set(range(len(story.actors)))
        assert all(scene.present == tuple(sorted(scene.present)) for scene in story.scenes)


def test_casts_have_the_sizes_they_are_said_to_have():
    sizes = [len(story.actors) for story in TRAIN]
    assert [sizes.count(size) / len(sizes) for size in (1, 2, 3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.08)


def test_identity_stays_the_same_within_its_ranges():
    for story in TRAIN:
        assert len(set(story.identities)) == 1
        for name, (low, high) in IDENTITY_RANGES.items():
            value = getattr(story.identities[0], name)
            assert all(low <= one <= high for one in (value if isinstance(value, tuple) else (value,)))


def test_a_drifting_story_tells_the_same_with_identities_as_far_apart_as_asked_for():
    steady, some, much = (sample_story(5, drift=drift) for drift in (0.0, 0.3, 1.0))
    assert [caption(some, k) for k in range(3)] == [caption(steady, k) for k in range(3)]

    def spread(story):
        return [story.identities[0].horizon - identity.horizon for identity in story.identities]

    assert len(set(some.identities)) == 3
    assert spread(some) == pytest.approx([0.3 * one for one in spread(much)])


def test_colours_without_a_name_are_any_but_those_of_held_out_looks():
    stories = [sample_story(seed, drift=seed % 2 / 2, unnamed=0.5) for seed in range(300)]
    looks, nameless = set(), 0
    for story in stories:
        hues = [actor.usual_hue for actor in story.actors]
        assert all(hue_distance(a, b) > 29 for a, b in combinations(hues, 2))
        for k, actor in enumerate(story.actors):
            if actor.colour is None:
                nameless += 1
                looks |= {(actor.shape, nearest_colour(actor.hue + identity.hues[k])) for identity in story.identities}
    assert nameless / sum(len(story.actors) for story in stories) == pytest.approx(0.5, abs=0.08)
    assert looks == set(product(SHAPES, [*COLOURS, None])) - HELD_OUT_LOOKS
    assert [replace_colours(story) for story in stories] == [
        replace_colours(sample_story(seed, drift=seed % 2 / 2)) for seed in range(300)
    ]


def replace_colours(story):
    """What is left of a story without its colours."""
    actors = [dataclasses.replace(actor, colour=None, hue=None) for actor in story.actors]
    return dataclasses.replace(story, actors=tuple(actors))


def test_a_caption_leaves_out_a_colour_as_the_text_encoder_learned_to_have_words_hidden():
    actor = DescribedActor(number=1, shape="square", colour=None, accessory="hat", action="jumps")
    text = write_caption(Description(actors=(actor,), setting="snow"))
    assert text == f"Actor1 {UNNAMED} square, wearing a hat) jumps in the snow."
    assert text.replace(UNNAMED, "(red") == write_caption(
        Description(actors=(dataclasses.replace(actor, colour="red"),), setting="snow")
    )


def test_a_new_identity_changes_everything_that_captions_do_not_say():
    other = with_new_identity(TRAIN[0], 1)
    assert other.scenes == TRAIN[0].scenes and other.actors == TRAIN[0].actors
    for field in dataclasses.fields(other.identities[0]):
        assert getattr(other.identities[0], field.name) != getattr(TRAIN[0].identities[0], field.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 0, "num_scenes": 0}, "num_scenes at least 1"),
        ({"seed": 0, "split": "test"}, '"train" or "held_out", but got \'test\''),
        ({"seed": 0, "drift": 1.5}, "drift must lie between 0"),
        ({"seed": 0, "unnamed": 1.5}, "unnamed must lie between 0 and 1"),
        ({"seed": 0, "split": "held_out", "unnamed": 0.5}, 'be 0 for split="held_out"'),
    ],
)
def test_stories_that_there_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_story(**arguments)


def test_captions_have_the_methods_form():
    hat = DescribedActor(number=1, shape="circle", colour="red", accessory="hat", action="moves right")
    plain = DescribedActor(number=2, shape="square", colour="blue", accessory="none", action="jumps")
    boots = DescribedActor(number=3, shape="triangle", colour="green", accessory="boots", action="move apart")
    assert write_caption(Description(actors=(hat,), setting="desert")) == (
        "Actor1 (red circle, wearing a hat) moves right across the desert."
    )
    assert write_caption(Description(actors=(hat, plain), setting="night")) == (
        "Actor1 (red circle, wearing a hat) moves right and Actor2 (blue square) jumps in the night."
    )
    together = dataclasses.replace(plain, action="move apart")
    assert write_caption(Description(actors=(hat, together, boots), setting="beach")) == (
        "Actor1 (red circle, wearing a hat) moves right and Actor2 (blue square) and "
        "Actor3 (green triangle, wearing boots) move apart along the beach."
    )


@pytest.mark.parametrize("stories", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_a_caption_is_read_back_as_what_it_describes(stories):
    for story in stories:
        for k in range(3):
            assert parse_caption(caption(story, k)) == describe(story, k)


def test_an_actor_is_described_with_the_same_words_in_each_scene():
    for story in TRAIN:
        mentions = {text for k in range(3) for text in re.findall(r"Actor\d \([^)]*\)", caption(story, k))}
        assert len(mentions) == len(story.actors)


HAT = "Actor1 (red circle, wearing a hat)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has to end with a setting, which is one of across the desert, in the desert"),
        (f"{HAT} jumps in the sea.", "has to end with a setting"),
        ("A fox jumps in the snow.", 'has to begin with an actor, such as "Actor1'),
        (f"Then {HAT} jumps in the snow.", "has to begin with an actor"),
        ("Actor1 (orange circle) jumps in the snow.", "'orange' is no colour of Actor1; there are red, yellow, green"),
        (
            "Actor1 (red star) jumps in the snow.",
            "'star' is no shape of Actor1; there are circle, square and triangle",
        ),
        ("Actor1 (red circle, wearing a tie) jumps in the snow.", "'wearing a tie' is no accessory of Actor1"),
        (f"{HAT} flies in the snow.", "'flies' is no action of Actor1 alone; it can do moves right, moves left"),
        (f"{HAT} move apart in the snow.", "'move apart' is no action of Actor1 alone; that takes two actors"),
        (f"{HAT} and Actor2 (blue circle) jumps in the snow.", "Actor1 and Actor2 can do together move towards"),
        (f"{HAT} jumps; Actor2 (blue circle) jumps in the snow.", 'joined by ", " or " and "'),
        ("Actor4 (red circle) jumps in the snow.", "there is no Actor4; a story has Actor1 to Actor3"),
        (f"Actor2 (blue circle) jumps and {HAT} jumps in the snow.", "in the order of the numbers"),
        (f"{HAT} jumps and Actor2 (red square) jumps in the snow.", "a colour of its own"),
        (
            ", ".join(f"Actor{k} ({colour} circle) jumps" for k, colour in enumerate(COLOURS, 1)) + " in the snow.",
            "it has 5 actors, but a scene shows at most 3",
        ),
    ],
)
def test_captions_outside_the_world_are_refused_with_what_is_possible(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_caption(text)
    assert repr(text) in str(caught.value)
