import json
import shlex

import pytest

from mask2dit.command import split_arguments
from mask2dit.config import load_config
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import check_command, parse_manifest, read_manifest


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return DataConfig(manifest=str(path))


def test_a_csv_has_one_clip_a_row(tmp_path):
    config = write(
        tmp_path,
        "a.csv",
        'fps,width,height,caption,path,num_frame\n23.976,720,480,"A fox, red.",x/1.mp4,72\n,,,B,2.mp4,\n',
    )
    (one,), (two,) = read_manifest(config)
    assert (one.caption, one.name, one.path, one.label) == ("A fox, red.", "x/1.mp4", tmp_path / "x/1.mp4", "row 1")
    assert (one.fps, one.width, one.height, one.num_frames) == (23.976, 720, 480, 72)
    assert (two.fps, two.width, two.height, two.num_frames, two.label) == (None, None, None, None, "row 2")


def test_a_json_has_consecutive_scenes_a_row(tmp_path):
    scene = {"vid": "v", "width": 720, "height": 480, "duration": 3.02, "fps": 24, "url": "1.mp4", "caption": "A"}
    config = write(tmp_path, "a.json", json.dumps([{"prefix": "p", "values": [scene, {"url": "2", "caption": "B"}]}]))
    ((one, two),) = read_manifest(config)
    assert (one.caption, one.path, one.num_frames, one.fps) == ("A", tmp_path / "1.mp4", 72, 24)
    assert (one.label, two.label) == ("row 1 scene 1", "row 1 scene 2")
    assert two.num_frames is None


def test_paths_start_at_the_data_root_if_there_is_one(tmp_path):
    config = write(tmp_path, "a.csv", "caption,path\nA,1.mp4\nB,/abs/2.mp4\n")
    config.data_root = "/videos"
    assert [str(row[0].path) for row in read_manifest(config)] == ["/videos/1.mp4", "/abs/2.mp4"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "caption,path\nA,1\n,2\n", "a.csv, row 2, caption: is empty"),
        ("a.csv", "caption,path\nA, \n", "row 1, path: is empty"),
        ("a.csv", "caption,path\nA,b,1.mp4\n", "row 1, columns: more fields than the header's 2: put a caption with"),
        ("a.csv", "caption,path\nA\n", "row 1, columns: fewer fields than the header's 2"),
        ("a.csv", "fps,caption,path\nfast,A,1\n", "row 1, fps: has to be a positive number, but is 'fast'"),
        ("a.csv", "num_frame,caption,path\n7.5,A,1\n", "num_frame: has to be a positive whole number, but is '7.5'"),
        (
            "a.csv",
            "caption,path\n ,\nA,\n,1\n",
            "row 1, path: is empty (and 1 more problems); python -m mask2dit.data.",
        ),
        ("a.csv", 'caption,path\nA,1\n"B" b,2\nC,3\n', "row 2, quotes: ',' expected after"),
        ("a.csv", 'caption,path\nA,1\n"B,2\nC,3\n', "row 2, quotes: unexpected end of data"),
        ("a.csv", "caption,path,path\nA,1,2\n", "it has the column 'path' 2 times"),
        ("a.csv", 'caption,"path" \nA,1\n', "its first line has to name the columns"),
        ("a.csv", "caption,path\nA,1\nB,2\0\n", "row 2, "),
        ("a.csv", "path\n1\n", "cannot be read: it has no column 'caption'"),
        ("a.csv", "caption,path\n", "has no rows"),
        ("a.csv", "", "it has no column 'path'"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "{}", "it has to be a list of rows, but is an object"),
        ("a.json", "[", "cannot be read: Expecting value"),
        ("a.json", '[{"values": 3}]', "row 1, values: has to be a list of scenes, but is a number"),
        ("a.json", '[{"prefix": "a"}]', "row 1, values: has to be a list of scenes;"),
        ("a.json", '["a"]', "row 1, values: has to be a list of scenes;"),
        ("a.json", '[{"values": ["a"]}]', "row 1 scene 1, values: a scene has to be an object, but is a text"),
        ("a.json", '[{"values": [{"url": "a"}]}]', "row 1 scene 1, caption: is missing"),
        ("a.json", '[{"values": [{"url": 1, "caption": "a"}]}]', "row 1 scene 1, url: has to be a text, but is 1"),
        ("a.json", '[{"values": [{"url": "a", "caption": "a", "fps": "24"}]}]', "fps: has to be a positive number"),
        ("a.json", '[{"values": [{"url": "a", "caption": "a", "width": true}]}]', "width: has to be a positive whole"),
        ("a.json", "[" * 100_000, "cannot be read: it is nested too deeply"),
        ("a.json", '[{"values": [{"url": "a", "caption": "x \\ud83d y"}]}]', "row 1 scene 1, caption: holds half of"),
        ("a.json", '[{"values": [{"url": "a\\u0000", "caption": "a"}]}]', "row 1 scene 1, url: holds a NUL"),
        (
            "a.json",
            '[{"values": [{"url": "a", "caption": "a", "fps": NaN}]}]',
            "row 1 scene 1, fps: has to be a positive",
        ),
        (
            "a.json",
            '[{"values": [{"url": "a", "caption": "a", "fps": 1%s}]}]' % ("0" * 400),
            "fps: has to be a positive",
        ),
        (
            "a.json",
            '[{"values": [{"url": "a", "caption": "a", "fps": 1e308, "duration": 1e308}]}]',
            "duration: is too",
        ),
        ("a.txt", "", "a manifest is a .csv or a .json file"),
    ],
)
def test_a_fault_is_told_with_row_and_field(tmp_path, name, text, message):
    with pytest.raises(ValueError) as error:
        read_manifest(write(tmp_path, name, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_manifest_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_manifest(DataConfig(manifest="nowhere.csv"))


def test_the_command_that_a_message_names_checks_what_is_used_here(tmp_path):
    config = DataConfig(kind="finetune", manifest=str(tmp_path / "my scenes.json"), data_root="/videos", num_windows=2)
    _, _, _, *arguments = shlex.split(check_command(config))
    [manifest], overrides = split_arguments(arguments)
    assert load_config(DataConfig, None, [*overrides, f"manifest={manifest}"]) == config


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "shift-jis"])
def test_texts_of_other_encodings_are_faults_of_their_rows(tmp_path, encoding):
    text = {"cp1251": "кот", "shift-jis": "猫"}.get(encoding, "café")
    (tmp_path / "a.csv").write_bytes(f"caption,path\nA,1.mp4\n{text} x,2.mp4\nC,3.mp4\n".encode(encoding))
    rows, [problem] = parse_manifest(DataConfig(manifest=str(tmp_path / "a.csv")))
    assert [len(row) for row in rows] == [1, 0, 1]
    assert (
        (problem.row, problem.field) == (2, "caption") and "UTF-8" in problem.message and "cp1252" in problem.message
    )
    assert (text in problem.message) == (text == "café")
    scenes = [{"url": "a", "caption": "A"}, {"url": "b", "caption": text}]
    content = json.dumps([{"values": scenes}], ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(content.encode(encoding))
    _, [problem] = parse_manifest(DataConfig(manifest=str(tmp_path / "a.json")))
    assert problem.label == "row 1 scene 2" and "UTF-8" in problem.message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.json", "a.Json"])
def test_byte_order_marks_and_capitals_in_the_suffix_are_understood(tmp_path, name, encoding):
    scene = {"url": "1.mp4", "caption": "café 🎂", "fps": 8, "duration": 2}
    text = (
        "path,caption,num_frame\n1.mp4,café 🎂,16\n"
        if "csv" in name.lower()
        else json.dumps([{"prefix": "a", "values": [scene]}], ensure_ascii=encoding == "utf-8-sig")
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    [[clip]] = read_manifest(DataConfig(manifest=str(tmp_path / name)))
    assert (clip.caption, clip.num_frames) == ("café 🎂", 16)


def test_rows_without_any_value_are_skipped_and_values_beyond_the_columns_may_be_empty(tmp_path):
    config = write(tmp_path, "a.csv", "caption,path\nA,1.mp4,,\n,\n\n , ,\nB,2.mp4\n,,,\n")
    assert [row[0].label for row in read_manifest(config)] == ["row 1", "row 2"]


def test_a_folder_is_not_a_manifest(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match=r"a\.json' is a folder"):
        read_manifest(DataConfig(manifest=str(tmp_path / "a.json")))


def test_a_clip_may_be_a_frame_range_and_a_part_of_the_picture(tmp_path):
    rows = (
        "caption,path,start,end,crop,num_frame\nA,film.mp4,10,40,,30\nB,film.mp4,40,,16 0 128 192,\nC,film.mp4,,,,\n"
    )
    (one,), (two,), (three,) = read_manifest(write(tmp_path, "a.csv", rows))
    assert (one.start, one.end, one.crop, one.num_frames) == (10, 40, None, 30)
    assert (two.start, two.end, two.crop, two.num_frames) == (40, None, (16, 0, 128, 192), None)
    names = ["film.mp4#10-40", "film.mp4#40-@16,0,128,192", "film.mp4"]
    assert [one.name, two.name, three.name] == names
    assert {clip.path for clip in (one, two, three)} == {tmp_path / "film.mp4"}
    scene = {
        "url": "film.mp4",
        "caption": "A",
        "start": 0,
        "end": 30,
        "crop": [0, 0, 8, 8],
        "fps": 24,
        "duration": 1.3,
    }
    ((same,),) = read_manifest(write(tmp_path, "a.json", json.dumps([{"values": [scene]}])))
    assert (same.name, same.num_frames) == ("film.mp4#0-30@0,0,8,8", 30)


@pytest.mark.parametrize(
    "scene, message",
    [
        ({"start": 30, "end": 30}, "end: has to be above start=30"),
        ({"start": -1}, "start: has to be a whole number of at least 0, but is -1"),
        ({"start": 1.5}, "start: has to be a whole number of at least 0, but is 1.5"),
        ({"end": 0}, "end: has to be a positive whole number"),
        ({"crop": [0, 0, 8]}, "crop: has to be top, left, height and width in pixels as a list"),
        ({"crop": [0, 0, 0, 8]}, "crop: has to be top"),
        ({"crop": 5}, "crop: has to be top"),
        ({"end": 30, "fps": 10, "duration": 4}, "duration: is 40 frames, but start and end hold 30"),
    ],
)
def test_a_faulty_range_is_named(tmp_path, scene, message):
    text = json.dumps([{"values": [{"url": "1.mp4", "caption": "A", **scene}]}])
    with pytest.raises(ValueError, match="row 1 scene 1, " + message):
        read_manifest(write(tmp_path, "a.json", text))
