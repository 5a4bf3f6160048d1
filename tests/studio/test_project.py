import errno
from dataclasses import replace

import numpy as np
import pytest
import torch

from mask2dit.stories import read_story
from mask2dit.studio import project as module
from mask2dit.studio.project import Draft, DraftScene, StaleDraftError

FRAMES, LATENTS = np.zeros((9, 64, 64, 3), np.uint8), torch.zeros(1, 5, 4, 32, 32)
RECORD = {"prompt": "a fox", "context": None}


def test_a_draft_is_kept_as_it_is_with_a_story_file_while_it_is_a_whole_story(projects, draft):
    project = projects.create(draft)
    assert project.name == "at-the-beach" and list(projects) == ["at-the-beach"]
    assert replace(project.load(), revision=0) == draft
    assert read_story(project.folder / "story.yaml").prompts == draft.story().prompts
    half = project.save(replace(project.load(), scenes=(*draft.scenes, DraftScene())))
    assert project.load() == half and project.story_file is None
    assert projects.create(draft).name == "at-the-beach-2"


def test_a_tab_does_not_overwrite_what_another_one_saved(projects, draft):
    project = projects.create(draft)
    shown = project.load()
    project.save(replace(shown, title="One"), tab="a")
    project.save(replace(shown, title="Two"), tab="a")  # typed while it was saving
    with pytest.raises(StaleDraftError, match="another tab"):
        project.save(replace(shown, title="Three"), tab="b")
    assert project.load().title == "Two"
    unchanged = project.save(replace(project.load(), revision=0), tab="b")  # shows the page and changes nothing
    assert unchanged.saved_by == "a"


@pytest.mark.parametrize("name", ["", ".", "..", "../at-the-beach", "at-the-beach/../at-the-beach", "/etc", "a\0b"])
def test_a_name_that_is_no_project_is_refused(projects, draft, name):
    projects.create(draft)
    with pytest.raises(ValueError, match="there is no project"):
        projects.open(name)


@pytest.mark.parametrize("title", ["<script>alert(1)</script>", "../../etc", "日本の朝", "a" * 300, "…"])
def test_any_title_gives_a_folder_within_the_projects(projects, title):
    project = projects.create(Draft(title=title))
    assert project.folder.parent == projects.folder and project.load().title == title


def test_a_damaged_draft_is_named(projects, draft):
    project = projects.create(draft)
    for text in ("{", "[]", '{"scenes": [{"what": 1}], "cast": []}'):
        (project.folder / "draft.json").write_text(text)
        with pytest.raises(ValueError, match=r"draft\.json is damaged"):
            project.load()


def test_versions_are_kept_and_the_newest_or_the_chosen_one_counts(projects, draft):
    project = projects.create(draft)
    assert project.chosen("x") is None
    for _ in range(2):
        project.add_version("x", FRAMES, LATENTS, 8, RECORD)
    (project.folder / "scenes/x/3.mp4").write_bytes(b"half")  # of a killed process
    assert [version.number for version in project.versions("x")] == [1, 2]
    assert project.chosen("x").number == 2
    project.choose("x", 1)
    assert project.chosen("x").number == 1
    assert project.add_version("x", FRAMES, LATENTS, 8, RECORD).number == 3
    assert project.chosen("x").number == 3
    with pytest.raises(ValueError, match="no version 4"):
        project.choose("x", 4)


@pytest.mark.parametrize("writer", ["write_video", "save_latents", "write_text"])
def test_on_a_full_disk_nothing_is_lost(projects, draft, monkeypatch, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "cannot write: make room")

    project = projects.create(draft)
    project.add_version("x", FRAMES, LATENTS, 8, RECORD)
    before = project.load()
    with monkeypatch.context() as patched:
        patched.setattr(module, writer, full)
        with pytest.raises(OSError, match="make room"):
            project.add_version("x", FRAMES, LATENTS, 8, RECORD)
        if writer == "write_text":
            with pytest.raises(OSError, match="make room"):
                project.save(replace(before, title="Other"))
            with pytest.raises(OSError, match="make room"):
                projects.create(draft)
    assert project.load() == before and len(project.versions("x")) == 1
    assert list(projects) == ["at-the-beach"]
    assert project.add_version("x", FRAMES, LATENTS, 8, RECORD).number == 2


def test_uploads_are_checked_as_videos(projects, draft, own_clip, tmp_path):
    project = projects.create(draft)
    name = project.add_clip(own_clip, 10, 60)
    assert name.startswith("my-clip-") and (project.folder / "clips" / name).read_bytes() == own_clip.read_bytes()
    files = {
        "notes.mp4": (b"These are notes, and no video.", "is not a video"),
        "list.mp4": (b"#EXTM3U\nfile:///etc/passwd\n", "is not a video"),
        "empty.mp4": (b"", "is not a video"),
        "half.mp4": (own_clip.read_bytes()[:200], "is not a video that can be read"),
    }
    for file, (content, message) in files.items():
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.replace('.', '[.]')} {message}"):
            project.add_clip(tmp_path / file, 10, 60)
    with pytest.raises(ValueError, match="at most 1e-05 MB"):
        project.add_clip(own_clip, 0.00001, 60)
    with pytest.raises(ValueError, match="lasts 4 s, but at most 2 s"):
        project.add_clip(own_clip, 10, 2)
    assert [path.name for path in (project.folder / "clips").iterdir()] == [name]


def test_faults_of_a_story_are_sentences(draft):
    with pytest.raises(ValueError, match="no scenes: add one"):
        replace(draft, scenes=()).story()
    with pytest.raises(ValueError, match="Actor1 is in the cast twice"):
        replace(draft, cast=draft.cast * 2).story()
    assert replace(draft, cast=(), scenes=(DraftScene(prompt="a fox"),)).story().prompts == ("a fox",)


def test_opening_a_story_again_keeps_the_versions_of_unchanged_prompts(draft):
    story = replace(draft, scenes=(draft.scenes[2], DraftScene(prompt="Actor1 jumps."), draft.scenes[0])).story()
    ids = [scene.id for scene in draft.with_story(story).scenes]
    assert ids[0] == draft.scenes[2].id and ids[2] == draft.scenes[0].id and len(set(ids)) == 3


def test_there_is_an_end_of_adding_scenes(draft):
    many = replace(draft, scenes=tuple(DraftScene() for _ in range(module.MAX_SCENES)))
    with pytest.raises(ValueError, match="at most 100 scenes"):
        many.insert_scene(0, DraftScene())
