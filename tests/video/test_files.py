import os

import pytest

from mask2dit.video.files import VIDEO_SUFFIXES, is_video, list_files, list_videos


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0")


def names(folder):
    return [path.relative_to(folder).as_posix() for path in list_videos(folder)]


def test_the_usual_suffixes_are_videos_in_capitals_too(tmp_path):
    usual = [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv"]
    assert VIDEO_SUFFIXES.issuperset(usual)
    touch(tmp_path, *(f"a{suffix}" for suffix in usual), "b.MP4", "c.M4V", "notes.txt", "poster.jpg", "mp4")
    assert names(tmp_path) == sorted([*(f"a{suffix}" for suffix in usual), "b.MP4", "c.M4V"])
    assert len(list_files(tmp_path)) == len(usual) + 5


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "a.mp4", "._a.mp4", ".b.mp4", ".trash/c.mp4", "d/._e.mp4", "d/e.mp4", "d/.hidden/f.mp4")
    assert names(tmp_path) == ["a.mp4", "d/e.mp4"]
    assert not is_video(tmp_path / "._a.mp4")
    touch(tmp_path, ".hidden/films/g.mp4")  # a folder that is named may lie in a hidden one
    assert names(tmp_path / ".hidden/films") == ["g.mp4"]


def test_links_to_files_and_folders_are_followed_and_each_folder_is_listed_once(tmp_path):
    films, elsewhere = tmp_path / "films", tmp_path / "elsewhere"
    touch(films, "z/own.mp4")
    touch(elsewhere, "far.mp4", "below/farther.mov")
    (films / "a_link").symlink_to("z")
    (films / "b_link").symlink_to(elsewhere)
    (films / "c_link").symlink_to(elsewhere / "below")
    (films / "file.mkv").symlink_to(elsewhere / "far.mp4")
    found = names(films)
    assert "b_link/far.mp4" in found and "z/own.mp4" in found and "file.mkv" in found
    assert len(found) == 4 and sum(name.endswith("farther.mov") for name in found) == 1
    (tmp_path / "linked").symlink_to(films)
    assert len(names(tmp_path / "linked")) == 4


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/b/film.mp4")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/here").symlink_to(".")
    os.symlink("itself.mp4", tmp_path / "itself.mp4")
    assert names(tmp_path) == ["a/b/film.mp4"]


def test_dead_links_are_told_and_a_missing_folder_is_an_error(tmp_path, caplog):
    touch(tmp_path, "a.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    assert names(tmp_path) == ["a.mp4"]
    assert "gone.mp4" in caplog.text and "nowhere.mp4" in caplog.text
    with pytest.raises(OSError, match="nowhere"):
        list_videos(tmp_path / "nowhere")
