"""`mask2dit check` with a story file."""

import re
from pathlib import Path

import numpy as np
import pytest

from mask2dit import cli
from mask2dit.video.writing import write_video

BAD = """\
title: Market Morning
styl: soft watercolour
seed: -1
cast:
  Actor1: a woman, wearing a yellow raincoat
  Actor2: an old man
  Actor3: an owl
  <b>Mia</b>: a girl
  Actor1: a woman
scenes:
  - Actor1 walks between the stalls.
  - prompt: Actor1 buys oranges from Actor4.
    second: 6
    frames: many
  - 'Actor2 says': hello
  - prompt: ""
  - [7]
  - prompt: Actor1 (a fox) waves at Actor2.
    seconds: 2
    frames: 9
  - prompt: Actor1 sleeps.
    video: nowhere.mp4
  - prompt: Actor1 wakes.
    video: notes.txt
  - Actor2 walks.
title: Again
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys, small_model):
    """Checks a file with this content. Returns the status, and the line and the text of each fault."""
    monkeypatch.chdir(tmp_path)

    def checked(content: str | bytes, *options: str, name: str = "story.yaml"):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        model = [] if any(option.startswith("model=") for option in options) else [f"model={small_model}"]
        status = cli.main(["check", name, *model, *options])
        printed = capsys.readouterr().out.splitlines()
        return status, [
            (int(line or 0), f"{level}: {text}")
            for line, level, text in re.findall(
                rf"^{re.escape(name)}:(?:(\d+):)? (error|warning): (.*)$", "\n".join(printed), re.M
            )
        ]

    return checked


def test_every_fault_is_told_with_its_line(check, tmp_path):
    (tmp_path / "notes.txt").write_text("not a video")
    status, faults = check(BAD)
    expected = [
        (2, "no key 'styl'; did you mean 'style'"),
        (3, "seed has to be a whole number"),
        (7, "Actor3 of the cast is in no scene"),
        (8, "actors are named Actor1, Actor2"),
        (9, "the key 'Actor1' is there twice"),
        (12, "Actor4 is not in the cast"),
        (13, "no key 'second'; did you mean 'seconds'"),
        (14, "frames has to be a whole number from 1 to 100000, but is 'many'"),
        (15, "'Actor2 says: hello' has a colon: put quotes"),
        (16, "the prompt is missing"),
        (17, r"a scene is a prompt, or has a prompt, but is \["),
        (18, r"followed by '\(a fox\)'"),
        (20, "both give the length"),
        (21, "nowhere.mp4"),
        (23, "notes.txt"),
        (26, "the key 'title' is there twice"),
    ]
    assert status == 1
    assert [line for line, _ in faults] == [line for line, _ in expected]
    for (_, text), (_, wanted) in zip(faults, expected):
        assert text.startswith("error: ") and re.search(wanted, text)


def test_what_the_model_does_not_carry_is_told(check, tmp_path):
    write_video(tmp_path / "short.mp4", np.full((5, 64, 96, 3), 90, dtype=np.uint8), fps=8)
    story = f"""\
title: Long
scenes:
  - {"a fox walks in the rain " * 60}
  - prompt: A lake.
    seconds: 1.2
  - prompt: A hut.
    video: short.mp4
"""
    status, faults = check(story)
    assert status == 1 and [line for line, _ in faults] == [3, 4, 6]
    assert "warning: scene 1: a prompt of" in faults[0][1] and "cut off: '" in faults[0][1]
    assert "1.2 s at 8 fps are 9.6 frames; the nearest number that the model carries is 9" in faults[1][1]
    assert "error" in faults[2][1] and "5 frames" in faults[2][1]
    status, faults = check(story.replace("short.mp4", "short.mp4\n    frames: 5").replace("    seconds: 1.2\n", ""))
    assert (status, len(faults)) == (0, 1)


def test_captions_that_the_small_world_does_not_know_are_told(check):
    world = str(cli.__file__).replace("mask2dit/cli.py", "models/storyworld")
    status, faults = check("title: A\nscenes: [A fox., Actor1 (red circle) jumps in the snow.]", f"model={world}")
    assert status == 1 and [line for line, _ in faults] == [2] and "scene 1" in faults[0][1]
    many = "title: A\ncast: {Actor1: red circle}\nscenes:\n" + "  - Actor1 jumps in the snow.\n" * 4
    status, faults = check(many, f"model={world}")
    assert status == 1 and "window=3" in faults[0][1]
    assert check(many, f"model={world}", "window=3") == (0, [])


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"title: A\nscenes:\n  - prompt: a\n    seconds: 1.0e+300\n", 4, "at most 3600"),
        (b"title: A\nscenes:\n  - prompt: a\n    seconds: .nan\n", 4, "at most 3600"),
        (b"stories:\n- title: A\n  scenes: [a]\n- title: a!\n  scenes: [a]\n", 4, "several stories are named 'a'"),
        (b"", 1, "the file is empty"),
        (b" \n\n", 1, "the file is empty"),
        (b"title: A\nscenes:\n\t- a\n", 3, "a tab"),
        (b"title: A\nscenes:\n  - a: b: c\n", 3, "put quotes around the text"),
        (b"title: A\nscenes:\n  - caf\xe9\n", 3, "not UTF-8"),
        (b"title: A\nscenes:\n  - a\x00b\n", 3, r"control character U\+0000"),
        (b"title: A\nscenes: [", 2, "not YAML"),
        (b"title: A\nscenes: &a\n  - *a\n", 0, "nested too deeply"),
        (b"- a\n", 1, "a story has a title"),
        (b"hello\n", 1, "has to hold a story"),
        (b"title: A\nscenes: []\n", 2, "no scenes"),
        (b"title: '!?'\nscenes: [a]\n", 1, "letters or digits"),
        (b"title: A\ncast: [Actor1]\nscenes: [a]\n", 2, "the cast gives each actor a description"),
        (b"title: A\ncast: {Actor1: }\nscenes: [Actor1]\n", 2, "no description"),
    ],
)
def test_nonsense_is_one_sentence_with_its_line(check, content, line, message):
    status, [(where, text)] = check(content)
    assert (status, where) == (1, line) and re.search(message, text)


def test_a_mark_of_byte_order_windows_line_ends_and_other_scripts_are_read(check):
    story = "\ufefftitle: 狐狸\r\ncast:\r\n  Actor1: una zorra roja\r\nscenes:\r\n  - Actor1 走在雪中。\r\n  - Лиса спит.\r\n"
    assert check(story) == (0, [])


def test_many_scenes_at_once_are_warned_of_and_tags_execute_nothing(check, tmp_path):
    status, [(line, text)] = check("title: A\nscenes:\n" + "  - In the rain.\n" * 50)
    assert (status, line) == (0, 2) and "50 scenes are generated together" in text and "window=3" in text
    content = f"title: A\nscenes: !!python/object/apply:os.system ['touch {tmp_path}/done']\n"
    check(content)
    assert not (tmp_path / "done").exists()


def test_check_tells_stories_from_manifests_and_configurations(check, tmp_path, capsys):
    assert check("A fox.\n\nA lake.\n", name="story.txt") == (0, [])
    (tmp_path / "config.yaml").write_text("kind: pretrain\nmanifest: nowhere.csv\n")
    assert cli.main(["check", "config.yaml"]) == 1
    assert "nowhere.csv" in capsys.readouterr().err
    assert cli.main(["check", "nowhere.txt"]) == 1
    assert "there is no story file 'nowhere.txt'" in capsys.readouterr().err
    assert cli.main(["check", "story.txt", "model=nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["check", "story=", "--help"]) == 0
    assert "num_frames=null" in capsys.readouterr().out
    cli.main(["check", "story.txt"])  # the published model is not here
    assert "warning: prompts and lengths are not checked against a model" in capsys.readouterr().out


def test_the_shipped_stories_are_faultless(monkeypatch, capsys):
    root = Path(cli.__file__).parents[1]
    monkeypatch.chdir(root)
    shipped = sorted(str(path.relative_to(root)) for path in (root / "datasets/stories").iterdir())
    assert shipped == ["datasets/stories/lantern.yaml", "datasets/stories/storyworld.yaml"]
    assert cli.main(["check", shipped[1], "model=models/storyworld", "window=3"]) == 0
    assert "errors: 0, warnings: 0" in capsys.readouterr().out
    assert cli.main(["check", shipped[0]]) == 0
    assert "errors: 0" in capsys.readouterr().out
