"""Each form that others use, on a file written for it."""

import json

import pytest

from mask2dit.stories import StoryError, read_stories, read_story

STORYMEM = {
    "story_overview": "A fox finds a lantern and carries it home.",
    "scenes": [
        {
            "scene_num": 1,
            "video_prompts": ["A red fox trots through a birch forest.", "It stops and lifts a lantern."],
            "cut": ["True", "False"],
        },
        {"scene_num": 2, "video_prompts": ["The fox sits by a cabin."], "cut": ["True"]},
        {"scene_num": 3, "video_prompts": ["It falls asleep.", "Northern lights."], "cut": [False, True]},
    ],
}


@pytest.fixture
def write(tmp_path):
    def written(name: str, content: object):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
        return path

    return written


def test_shots_of_storymem_that_continue_without_a_cut_are_one_scene(write):
    story = read_story(write("red_fox.json", STORYMEM))
    assert story.title == "red fox"
    assert story.prompts == (
        "A red fox trots through a birch forest. It stops and lifts a lantern.",
        "The fox sits by a cabin. It falls asleep.",
        "Northern lights.",
    )


def test_a_damaged_script_of_storymem_is_told_by_scene(write):
    scenes = [{"video_prompts": ["A fox."]}, {"video_prompts": "a text"}, {"scene_num": 3}, {"video_prompts": [7]}]
    with pytest.raises(StoryError) as error:
        read_story(write("fox.json", {"scenes": scenes}))
    assert [fault.where for fault in error.value.faults] == ["scene 3", "scene 4"]
    assert read_story(write("fox.json", {"scenes": scenes[:2]})).prompts == ("A fox.", "a text")


@pytest.mark.parametrize(
    "local_prompts, segment_lengths",
    [(["A fox walks.", "A fox sleeps."], [49, 25]), ("A fox walks. | A fox sleeps.", "49, 25")],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_global_prompt_is_the_style_and_lengths_are_frames(write, local_prompts, segment_lengths, suffix):
    content = {"global_prompt": "watercolour", "local_prompts": local_prompts, "segment_lengths": segment_lengths}
    story = read_story(write(f"relay.{suffix}", content))
    assert story.prompts == ("A fox walks. watercolour", "A fox sleeps. watercolour")
    assert [scene.frames for scene in story.scenes] == [49, 25]
    story = read_story(write(f"relay.{suffix}", {**content, "frame_rate": 24}))
    assert [scene.seconds for scene in story.scenes] == [2.0417, 1.0417]


def test_lengths_that_are_no_numbers_are_told(write):
    content = {"global_prompt": "", "local_prompts": ["a", "b"], "segment_lengths": "9, long"}
    with pytest.raises(StoryError, match="scene 2: frames has to be a whole number from 1 to 100000, but is 'long'"):
        read_story(write("relay.json", content))


def test_each_paragraph_of_a_text_is_a_scene(write):
    path = write("My story.txt", "\ufeff\r\nA fox walks\r\nthrough snow.\r\n \t\r\n\r\nA lake: frozen.\r\n")
    story = read_story(path)
    assert (story.title, story.prompts) == ("My story", ("A fox walks through snow.", "A lake: frozen."))


def test_rows_of_a_manifest_are_stories(write):
    rows = [{"prefix": f"films/{i}", "values": [{"url": "a.mp4", "caption": f"A fox {i}."}]} for i in range(2)]
    assert [story.prompts for story in read_stories(write("sft.json", rows))] == [("A fox 0.",), ("A fox 1.",)]
    with pytest.raises(ValueError, match=r"holds 2 stories \('films/0', 'films/1'"):
        read_story(write("sft.json", rows))
