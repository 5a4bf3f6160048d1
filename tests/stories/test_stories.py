import json
from pathlib import Path

import pytest
import yaml

from mask2dit.curation.answers import check_captions
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.stories import (
    Scene,
    Story,
    describe_actors,
    read_stories,
    read_story,
    story_from,
    write_stories,
    write_story,
)

SHIPPED = Path(__file__).parents[2] / "datasets/evaluation/stories.yaml"
FOX = "a red fox, wearing a blue scarf"


def record(**changes):
    scenes = [{"prompt": f"Actor1 ({FOX}) walks."}, {"prompt": f"Actor1 ({FOX}) sleeps.", "duration": 2}]
    return {"title": "The Fox", "cast": {"Actor1": FOX}, "scenes": scenes, **changes}


def test_the_shipped_set_is_50_stories_of_three_scenes_in_the_methods_form():
    stories = read_stories(SHIPPED)
    assert len(stories) == 50
    assert {len(story.prompts) for story in stories} == {3}
    assert {len(story.cast) for story in stories} == {1, 2, 3}
    assert len({story.cast["Actor1"] for story in stories}) == 50
    assert all(
        f"{actor} ({text})" in " ".join(story.prompts) for story in stories for actor, text in story.cast.items()
    )


def test_stories_are_written_as_they_are_read(tmp_path):
    story = story_from(record())
    assert (story.name, story.actors) == ("the-fox", [{"Actor1"}, {"Actor1"}])
    assert [scene.length(8) for scene in story.scenes] == [None, 16]
    write_stories(tmp_path / "stories.yaml", [story], "# a comment\n")
    assert read_stories(tmp_path / "stories.yaml") == [story]


def test_scenes_may_be_plain_texts_and_casts_may_be_left_out():
    story = story_from({"title": "Plain", "scenes": ["A road.", "A hill with Actor1."]})
    assert story.prompts == ("A road.", "A hill with Actor1.")


def test_a_manifest_of_fine_tuning_is_a_set_of_stories(tmp_path):
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([{"prefix": "films/7", "values": [{"url": "a.mp4", "caption": "A fox."}]}]))
    (story,) = read_stories(path)
    assert (story.title, story.name, story.prompts) == ("films/7", "films-7", ("A fox.",))
    path.write_text('[{"prefix": "films/7", "values": [{"url": "a.mp4"}]}]')
    with pytest.raises(ValueError, match=r"sft\.json:1: story 1, scene 1: the prompt is missing"):
        read_stories(path)


FAULTS = {
    "no title": ({"title": None}, "needs a title"),
    "no scenes": ({"scenes": []}, "story 'The Fox', scenes: the story has no scenes"),
    "an empty prompt": ({"scenes": [{"prompt": " "}]}, "'The Fox', scene 1: the prompt is missing"),
    "a missing prompt": ({"scenes": [{"duration": 1}]}, "scene 1: the prompt is missing"),
    "a stranger": ({"scenes": [{"prompt": "Actor2 walks."}]}, "scene 1: Actor2 is not in the cast, which has Actor1"),
    "another description": ({"scenes": [{"prompt": "Actor1 (a fox) walks."}]}, "word for word"),
    "a late description": (
        {"scenes": [{"prompt": f"Actor1 walks. Actor1 ({FOX}) runs."}]},
        "scene 1: Actor1 is described at a later mention",
    ),
    "an absent actor": ({"cast": {"Actor1": FOX, "Actor2": "an owl"}}, "Actor2 of the cast is in no scene"),
    "a wrong name": ({"cast": {"Fox": FOX}}, "the cast has 'Fox', but actors are named Actor1"),
    "a wrong duration": ({"scenes": [{"prompt": f"Actor1 ({FOX}).", "duration": -1}]}, "positive number of seconds"),
    "an unknown key": ({"scene": []}, "there is no key 'scene'; did you mean 'scenes'"),
    "an unknown key of a scene": ({"scenes": [{"text": "a"}]}, "there is no key 'text'"),
}


@pytest.mark.parametrize("changes, message", FAULTS.values(), ids=FAULTS)
def test_a_faulty_story_is_refused_with_story_and_scene(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        story_from(record(**changes))
    path = tmp_path / "stories.yaml"
    path.write_text(yaml.safe_dump({"stories": [record(title="Good"), record(**changes)]}))
    with pytest.raises(ValueError, match=r"stories\.yaml:[0-9]+: story 2, "):
        read_stories(path)


def test_files_that_are_no_lists_of_stories_are_refused(tmp_path):
    path = tmp_path / "stories.yaml"
    with pytest.raises(FileNotFoundError, match="no story file"):
        read_stories(path)
    for text, message in (
        ("a: [", "not YAML"),
        ("a: b", "there is no key 'a'; known keys are title"),
        ("stories: []", "list of stories"),
        ("a text", "list of stories"),
        ("", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_stories(path)
    path.write_text(yaml.safe_dump({"stories": [record(), record(title="The  fox!")]}))
    with pytest.raises(ValueError, match="several stories are named 'the-fox'"):
        read_stories(path)


def test_descriptions_stand_behind_first_mentions_only():
    cast = {"Actor1": "a fox", "Actor2": r"an owl \1"}
    text = describe_actors("Actor2 sees Actor1. Actor1 and Actor2 run.", cast)
    assert text == r"Actor2 (an owl \1) sees Actor1 (a fox). Actor1 and Actor2 run."


@pytest.mark.parametrize("name", ["stories.json", "STORIES.JSON"])
def test_training_and_evaluation_read_the_same_texts(tmp_path, name):
    captions = ["a cake 🎂", "tab\tand \\/ slash", "née: yes"]
    scenes = [{"url": "a.mp4", "caption": caption} for caption in captions]
    (tmp_path / name).write_text(json.dumps([{"prefix": "a", "values": scenes}]).replace("/ slash", "\\/ slash"))
    (story,) = read_stories(tmp_path / name)
    [row] = read_manifest(DataConfig(kind="finetune", manifest=str(tmp_path / name)))
    assert story.prompts == tuple(clip.caption for clip in row) == tuple(captions)


def test_texts_that_no_file_can_hold_are_told_with_story_and_scene(tmp_path):
    for name, content, message in (
        ("a.json", b'[{"prefix": "a", "values": [{"caption": "x \\ud83d"}]}]', "story 1, scene 1: .*surrogate"),
        ("a.yaml", b'stories: [{title: a, scenes: ["x \\ud83d"]}]', "story 1, scene 1: .*surrogate"),
        ("a.yaml", b"stories: [{title: a, scenes: [caf\xe9]}]", "UTF-8"),
        ("a.json", b'[{"prefix": "a", "values": [{"caption": "caf\xe9"}]}]', "story 1, scene 1: .*UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.yaml", b"[" * 10_000, "not YAML"),
        ("a.yaml", b"stories: 2024-13-45", "list of stories"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_stories(tmp_path / name)
    with pytest.raises(OSError, match="is a folder"):
        read_stories(tmp_path)


def test_stories_and_captions_share_one_grammar_of_actors():
    cast = {f"Actor{number}": f"a fox with the number {number}" for number in (1, 10)}
    prompt = describe_actors("Actor10 follows Actor1. Actor10 and Actor1 sleep.", cast)
    assert story_from(record(cast=cast, scenes=[prompt])).actors == [{"Actor1", "Actor10"}]
    check_captions(cast, [prompt], max_words=100)
    for name in ("Actor0", "Actor01", "Actor"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            story_from(record(cast={name: "a fox"}, scenes=[f"{name} (a fox) sleeps."]))
        with pytest.raises(ValueError, match=f"'{name}'"):
            check_captions({name: "a fox"}, [f"{name} (a fox) sleeps."], max_words=100)
    with pytest.raises(ValueError, match="Actor10"):
        story_from(record(cast={"Actor1": FOX}, scenes=[f"Actor1 ({FOX}) sees Actor10."]))


WHOLE = """\
title: Market Morning
style: soft watercolour animation
negative: low resolution, watermark
seed: 7
cast:
  Actor1: a young woman, wearing a yellow raincoat
  Actor2: an old man in a striped apron
scenes:
  - Actor1 walks between the stalls.
  - prompt: Actor1 buys three oranges from Actor2
    seconds: 6
    seed: 12
    video: my/market.mp4
  - prompt: Actor2 (an old man in a striped apron) waves to Actor1. Actor2 smiles.
    frames: 49
"""


def test_a_story_file_gives_the_prompts_of_the_method(tmp_path):
    (tmp_path / "story.yaml").write_text(WHOLE)
    story = read_story(tmp_path / "story.yaml")
    woman, man = "a young woman, wearing a yellow raincoat", "an old man in a striped apron"
    assert story.prompts == (
        f"Actor1 ({woman}) walks between the stalls. soft watercolour animation",
        f"Actor1 ({woman}) buys three oranges from Actor2 ({man}), soft watercolour animation",
        f"Actor2 ({man}) waves to Actor1 ({woman}). Actor2 smiles. soft watercolour animation",
    )
    assert (story.negative, story.seed) == ("low resolution, watermark", 7)
    assert story.scenes[1] == Scene(
        prompt="Actor1 buys three oranges from Actor2", seconds=6, seed=12, video="my/market.mp4"
    )
    assert [scene.length(8) for scene in story.scenes] == [None, 48, 49]


AWKWARD = [
    "yes",
    "007",
    "a: b # c",
    "'",
    "- x",
    "null",
    "~",
    "tab\there",
    "two\nlines",
    "狐狸在雪中 🦊",
    "<b>Actor1</b>",
    "{a}",
    "x\x85y",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_story_is_read_as_it_was_written(tmp_path, text):
    story = Story(
        title=f"Fox {text}",
        style=text,
        negative=text,
        seed=0,
        cast={"Actor1": text},
        scenes=(Scene(prompt=f"{text} Actor1"), Scene(prompt=text, frames=9, seed=0), Scene(prompt=text, video=text)),
    )
    write_story(tmp_path / "story.yaml", story)
    assert read_story(tmp_path / "story.yaml") == story
    assert read_story(tmp_path / "story.yaml").prompts == story.prompts
