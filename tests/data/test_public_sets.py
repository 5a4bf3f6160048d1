import csv
import json

import pytest

from mask2dit.data.check import check_manifest
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.data.public_sets import PublicSetConfig, import_set


def manifest(folder, name, **changes):
    kind = "finetune" if name == "sft.json" else "pretrain"
    tiny = {"num_frames": 5, "height": 16, "width": 24, "max_stride": 1, "num_scenes": 2, **changes}
    return DataConfig(kind=kind, manifest=str(folder / name), **tiny)


def left_out(folder):
    return [json.loads(line) for line in (folder / "left_out.jsonl").open()]


@pytest.fixture
def table(tmp_path, numbered_video):
    """A table as of Panda-70M, of one video of 60 frames at 12 frames per second and one that is not there."""
    (tmp_path / "videos").mkdir()
    numbered_video(tmp_path / "videos/abc-123.mp4", 60)
    times = [["0:00:00.000", "0:00:01.000"], ["0:00:01.083", "0:00:02.500"], ["00:04.000", "0:00:05.083"]]
    rows = [
        ["abc-123", "https://x/abc-123", times, ["A fox.", "The fox\nruns, 'fast'.", "A hill."], [0.4, 0.5, 0.6]],
        ["gone", "https://x/gone", times, ["A", "B", "C"], [0, 0, 0]],
        [
            "abc-123",
            "",
            [["0:04.000", "0:09:00.000"], ["soon", "later"], ["0:00:00.000", "0:00:01.000"]],
            ["A", "B", ""],
            [],
        ],
        ["abc-123", "", times, ["A"], []],
    ]
    with (tmp_path / "panda.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["videoID", "url", "timestamp", "caption", "matching_score"], *rows])
    return tmp_path


def test_a_table_becomes_ranges_of_its_videos_and_names_what_it_leaves_out(table):
    out = table / "out"
    config = PublicSetConfig(videos=str(table / "videos"), captions=str(table / "panda.csv"), output=str(out))
    config.num_scenes = 2
    assert import_set(config) == 0
    ((first, second),) = read_manifest(manifest(out, "sft.json"))
    assert [(clip.start, clip.end) for clip in (first, second)] == [(0, 12), (13, 30)]
    assert (first.caption, second.caption) == ("A fox.", "The fox runs, 'fast'.")
    assert len(read_manifest(manifest(out, "pretrain.csv"))) == 3
    for name in ("sft.json", "pretrain.csv"):
        assert not check_manifest(manifest(out, name)).problems
    found = [(entry["video"], entry["shot"]) for entry in left_out(out)]
    assert found == [("gone", None), ("abc-123", 1), ("abc-123", 2), ("abc-123", 3), ("abc-123", None)]
    assert "the video has 60" in left_out(out)[1]["why"] and "3 times, but 1 captions" in left_out(out)[4]["why"]


def test_a_table_without_its_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("video,start\n")
    (tmp_path / "videos").mkdir()
    config = PublicSetConfig(videos=str(tmp_path / "videos"), captions=str(tmp_path / "t.csv"), output=str(tmp_path))
    with pytest.raises(ValueError, match="has no column 'videoID'"):
        import_set(config)


@pytest.fixture
def folders(tmp_path, numbered_video):
    """Two videos as folders of shots: `a` with 1, 2, 10 and a broken 3, and `b` with one shot."""
    for name in ("a/shot_1", "a/shot_2", "a/shot_10", "b/shot_1"):
        path = tmp_path / f"videos/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered_video(path, 20)
        path.with_suffix(".txt").write_text(f"Caption of {name}.\n")
    return tmp_path


def test_folders_of_shots_become_rows_in_the_order_of_their_names(folders):
    out = folders / "out"
    config = PublicSetConfig(form="folders", videos=str(folders / "videos"), output=str(out), num_scenes=2)
    assert import_set(config) == 0
    (row,) = read_manifest(manifest(out, "sft.json"))
    assert [clip.caption for clip in row] == [f"Caption of a/shot_{i}." for i in (1, 2, 10)]
    assert len(read_manifest(manifest(out, "pretrain.csv"))) == 4
    assert not check_manifest(manifest(out, "sft.json")).problems
    (folders / "videos/a/shot_2.mp4").write_bytes(b"broken")
    assert import_set(config) == 0
    assert [(entry["video"], entry["shot"]) for entry in left_out(out)] == [("a", "shot_2.mp4")]
    assert len(read_manifest(manifest(out, "pretrain.csv"))) == 3


def test_a_json_as_of_shot2story_gives_the_order_and_the_captions(folders):
    records = [
        {"video": "a.mp4", "id": 0, "video_names": ["shot_2.mp4", "shot_1.mp4"], "captions": ["B.", "A."]},
        {"video": "b.mp4", "id": 1, "video_names": ["shot_1.mp4"], "captions": []},
    ]
    (folders / "s2s.json").write_text(json.dumps(records))
    out = folders / "out"
    videos, captions = str(folders / "videos"), str(folders / "s2s.json")
    assert (
        import_set(PublicSetConfig(form="folders", videos=videos, captions=captions, output=str(out), num_scenes=2))
        == 0
    )
    (row,) = read_manifest(manifest(out, "sft.json"))
    assert [(clip.caption, clip.path.name) for clip in row] == [("B.", "shot_2.mp4"), ("A.", "shot_1.mp4")]
    assert [entry["video"] for entry in left_out(out)] == ["b.mp4"]
