import json
import os
import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.data.check import main
from mask2dit.data.clips import choose_window
from mask2dit.data.config import DataConfig
from mask2dit.video import write_video

TINY = ["num_frames=9", "max_stride=2"]


@pytest.fixture
def run(capsys):
    """Runs the command and gives its exit status and the lines it prints, cells by cells."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        lines = capsys.readouterr().out.splitlines()
        return status, [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]

    return run


def test_a_csv_with_one_of_each_fault_is_told_row_by_row(run, tmp_path, numbered_video):
    numbered_video(tmp_path / "good.mp4", 40)
    numbered_video(tmp_path / "short.mp4", 19)
    (tmp_path / "broken.mp4").write_text("no video")
    manifest = tmp_path / "faulty.csv"
    manifest.write_text(
        "fps,width,height,caption,path,num_frame\n"
        "12,64,32,all is well,good.mp4,40\n"
        "12,64,32,missing,gone.mp4,40\n"
        "12,64,32,unreadable,broken.mp4,40\n"
        "12,64,32,too short,short.mp4,19\n"
        "12,64,32,,good.mp4,40\n"
        "12,64,wide,wrong type,good.mp4,40\n"
        "24,48,30,another than it says,./good.mp4,41\n"
        "12,64,32,commas, not in quotes,good.mp4,40\n"
    )
    status, lines = run(manifest, *TINY)
    broken = (
        f"video {tmp_path}/broken.mp4 cannot be read: it is not a video, or it is damaged or cut short; "
        "check that it plays, then download or encode it again"
    )
    short = "the file has 19 frames, but 20 are needed for 9 at stride 2 after the first and last 5% are dropped"
    columns = "more fields than the header's 6: put a caption with commas in quotes"
    assert status == 1
    assert lines == [
        [f"{manifest} for kind=pretrain: samples of 3 scenes, 9 frames each"],
        ["row", "field", "level", "problem"],
        ["row 2", "path", "error", f"there is no file {tmp_path}/gone.mp4"],
        ["row 3", "path", "error", broken],
        ["row 4", "num_frame", "error", short],
        ["row 5", "caption", "error", "is empty"],
        ["row 6", "height", "error", "has to be a positive whole number, but is 'wide'"],
        ["row 7", "num_frame", "warning", "the manifest says 41 frames, but the file has 40"],
        ["row 7", "fps", "warning", "the manifest says 24, but the file has 12"],
        ["row 7", "width", "warning", "the manifest says 48, but the file has 64"],
        ["row 7", "height", "warning", "the manifest says 30, but the file has 32"],
        ["row 7", "path", "warning", "is listed twice, first in row 1; a sample never takes it twice"],
        ["row 8", "columns", "error", columns],
        ["8 rows, 5 clips; errors: 6, warnings: 5, unusable rows: 6"],
    ]


def test_a_json_with_one_of_each_fault_is_told_scene_by_scene(run, tmp_path, numbered_video):
    numbered_video(tmp_path / "good.mp4", 40)
    numbered_video(tmp_path / "short.mp4", 8)
    numbered_video(tmp_path / "other.mp4", 40, size=(48, 64), fps=24)

    def scene(url=None, seconds=40 / 12, **values):
        if url is None:  # another file for each scene
            url = f"good {len(list(tmp_path.iterdir()))}.mp4"
            os.link(tmp_path / "good.mp4", tmp_path / url)
        return {"url": url, "caption": "a", "fps": 12, "width": 64, "height": 32, "duration": seconds} | values

    rows = [
        [scene(), scene(), scene()],
        [scene(), scene()],
        [scene(), scene("short.mp4", 8 / 12), scene(), scene()],  # the last two can be taken
        [scene(), scene("short.mp4", 8 / 12), scene()],
        [scene(), scene("short.mp4"), scene(), scene()],  # which the manifest does not know to be short
        [scene(), scene("other.mp4", fps=24, height=48, seconds=40 / 24)],
        [scene(), scene(caption=3)],
    ]
    manifest = tmp_path / "faulty.json"
    manifest.write_text(json.dumps([{"prefix": "p", "values": values} for values in rows]))
    status, lines = run(manifest, "kind=finetune", "num_scenes=2", *TINY)
    short = "the file has 8 frames, but 9 are needed even at stride 1"
    assert status == 1
    assert lines[2:] == [
        ["row 3 scene 2", "duration", "warning", short],
        ["row 4", "values", "error", "no 2 consecutive scenes of the row are long enough"],
        ["row 4 scene 2", "duration", "error", short],
        ["row 5 scene 2", "duration", "error", short],
        ["row 5 scene 2", "duration", "warning", "the manifest says 40 frames, but the file has 8"],
        ["row 6", "width, height", "warning", "differs within the row: 64x32, 64x48"],
        ["row 6", "fps", "warning", "differs within the row: 12, 24"],
        ["row 7 scene 2", "caption", "error", "has to be a text, but is 3"],
        ["7 rows, 19 clips; errors: 4, warnings: 4, unusable rows: 3"],
    ]
    status, lines = run(manifest, "kind=finetune", *TINY)
    assert ["row 2", "values", "error", "the row has 2 scenes, but a sample takes 3"] in lines


@pytest.mark.parametrize(
    "kind, num_windows, is_seen", [("pretrain", None, True), ("finetune", None, True), ("finetune", 1, False)]
)
def test_damage_is_found_wherever_training_may_read(kind, num_windows, is_seen, run, tmp_path, write_csv, write_json):
    noise = np.random.default_rng(0).integers(256, size=(90, 32, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, 12)
    data = bytearray((tmp_path / "noise.mp4").read_bytes())
    data[len(data) * 3 // 4 : len(data) * 3 // 4 + 3000] = bytes(3000)
    (tmp_path / "noise.mp4").write_bytes(data)
    manifest = write_csv([("noise.mp4", "a", 90)]) if kind == "pretrain" else write_json([[("noise.mp4", "a", 90)]])
    options = [f"kind={kind}", "num_scenes=1", f"num_windows={num_windows or 'null'}"]
    status, lines = run(manifest, *TINY, *options)
    if is_seen:
        assert status == 1 and f"video {tmp_path}/noise.mp4 cannot be decoded at or near frames" in lines[2][3]
    else:  # its one window lies elsewhere
        assert max(choose_window(DataConfig(kind=kind, num_frames=9, max_stride=2), "noise.mp4", 90, 0)) < 60
        assert status == 0


def test_a_frame_rate_that_varies_is_warned_of_row_by_row(run, tmp_path, write_csv):
    source = "-f lavfi -i testsrc2=s=64x32:r=12:d=5 -vf setpts='if(lt(N\\,30)\\,N\\,30+(N-30)*4)/12/TB' -fps_mode vfr"
    command = [get_ffmpeg_exe(), "-v", "error", *source.split(), "-c:v", "libx264", "varies.mkv"]
    subprocess.run(command, cwd=tmp_path, check=True)
    status, lines = run(write_csv([("varies.mkv", "a", 60)]), *TINY)
    assert status == 0
    assert lines[2][:3] == ["row 1", "path", "warning"] and "frame rate varies" in lines[2][3]


def test_a_good_manifest_ends_with_status_0(run, clips, write_csv):
    manifest = write_csv([(f"{k}.mp4", "a", 40 + k) for k in range(8)])
    assert run(manifest, *TINY, f"data_root={clips}") == (
        0,
        [
            [f"{manifest} for kind=pretrain: samples of 3 scenes, 9 frames each"],
            ["8 rows, 8 clips; errors: 0, warnings: 0, unusable rows: 0"],
        ],
    )


def test_warnings_alone_end_with_status_0(run, clips, write_csv):
    status, lines = run(write_csv([("1.mp4", "a", 40)]), *TINY, f"data_root={clips}")
    assert (status, lines[-1]) == (0, ["1 rows, 1 clips; errors: 0, warnings: 1, unusable rows: 0"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.csv"], "error: there is no manifest 'nowhere.csv'"),
        (["nowhere.csv", "kind=sft"], "error: kind has to be one of pretrain, finetune"),
        (["nowhere.csv", "knd=finetune"], "there is no key 'knd'; did you mean 'kind'?"),
        (["kind=finetune"], "error: name the manifest to check"),
        (["nowhere.csv", "finetune"], "only one argument can be a file, but there are 2: 'nowhere.csv', 'finetune'"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_told_in_one_sentence(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_manifest_and_keys_come_in_any_order(run, clips, write_csv):
    manifest = write_csv([("1.mp4", "a", 41)])
    expected = run(manifest, *TINY, f"data_root={clips}")
    assert expected[0] == 0
    assert run(*TINY, manifest, f"data_root={clips}") == expected
    assert run(*TINY, f"data_root={clips}", f"manifest={manifest}") == expected


def test_captions_beyond_the_text_window_are_told_where_the_model_is_named(run, clips, write_csv, small_model):
    long = "a red fox walks " * 300 + "past the lighthouse"
    manifest = write_csv([("1.mp4", "a fox", 41), ("2.mp4", long, 42)])
    status, lines = run(manifest, *TINY, f"data_root={clips}", f"model={small_model}")
    (row, field, level, message) = lines[2]
    assert (status, row, field, level) == (0, "row 2", "caption", "warning")
    assert "lighthouse" in message
    assert len(lines) == 4
    assert len(run(manifest, *TINY, f"data_root={clips}")[1]) == 2


def test_the_command_prints_its_report_and_nothing_else(clips, write_csv, capsys):
    manifest = write_csv([("1.mp4", "a", 41)])
    assert main([str(manifest), *TINY, f"data_root={clips}"]) == 0
    printed = capsys.readouterr()
    assert "1 rows, 1 clips" in printed.out and not printed.err


def test_one_file_that_cannot_be_reached_does_not_hide_the_other_rows(run, tmp_path, numbered_video):
    numbered_video(tmp_path / "good.mp4", 8)
    manifest = tmp_path / "long.csv"
    manifest.write_text(f"path,caption\n{'c' * 300}.mp4,a\ngood.mp4,b\n")
    status, lines = run(manifest, *TINY)
    assert status == 1 and [line[:2] for line in lines[2:4]] == [["row 1", "path"], ["row 2", "num_frame"]]


def test_a_file_listed_twice_under_any_path_is_a_warning(run, tmp_path, numbered_video):
    numbered_video(tmp_path / "good.mp4", 40)
    (tmp_path / "link.mp4").symlink_to("good.mp4")
    manifest = tmp_path / "twice.csv"
    manifest.write_text("path,caption\ngood.mp4,a\n./good.mp4,b\nlink.mp4,c\n")
    status, lines = run(manifest, *TINY)
    assert status == 0 and [line[:3] for line in lines[2:4]] == [[f"row {i}", "path", "warning"] for i in (2, 3)]
    scenes = [{"url": url, "caption": "a"} for url in ("good.mp4", "./good.mp4")]
    manifest = tmp_path / "twice.json"
    manifest.write_text(json.dumps([{"values": scenes}, {"values": scenes[:1]}]))
    _, lines = run(manifest, "kind=finetune", "num_scenes=1", *TINY)
    assert lines[2][:3] == ["row 1 scene 2", "url", "warning"] and len(lines) == 4
