import logging
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.curation.config import SplitConfig, WriteConfig
from mask2dit.curation.probe import Film, find_films, probe, shot_times
from mask2dit.curation.split import Scene, scenes, split
from mask2dit.curation.store import Dropped, Entry, Workspace, kept
from mask2dit.curation.write import Clip, cropped_frames, find_borders, write
from mask2dit.video.cuts import Transition
from mask2dit.video.reading import ArrayReader, open_video
from mask2dit.video.writing import write_video

CONTENT = SplitConfig(detectors=["content"])  # which takes less time than the default


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "out", stages=("probe", "split", "write"))


@pytest.fixture
def probed(films, workspace):
    return workspace.run("probe", Film, find_films(films, workspace), {}, partial(probe, folder=films))


def bounds(drawing, name):
    stops = np.cumsum([scene.frames for scene in drawing.FILMS[name]]).tolist()
    return list(zip([0, *stops], stops))


def test_films_are_probed_and_unreadable_files_are_listed(probed, drawing):
    [bars, broken, plain] = probed
    assert (plain.width, plain.height, plain.fps, plain.codec) == (192, 128, 12.0, "h264")
    assert plain.seconds == pytest.approx(sum(scene.frames for scene in drawing.FILMS["red_scarf.mp4"]) / 12, abs=0.1)
    assert (bars.id, bars.height) == ("bars/blue_scarf.mp4", 160)
    assert isinstance(broken, Dropped) and broken.rule == "unreadable" and "is not a video" in broken.why


def test_a_film_whose_frames_are_not_evenly_spaced_is_kept_with_a_warning(tmp_path):
    source = "-f lavfi -i testsrc2=s=64x32:r=12:d=5 -vf setpts='if(lt(N\\,30)\\,N\\,30+(N-30)*4)/12/TB' -fps_mode vfr"
    command = [get_ffmpeg_exe(), "-v", "error", *source.split(), "-c:v", "libx264", "varies.mkv"]
    subprocess.run(command, cwd=tmp_path, check=True)
    [(_, [film])] = probe([Entry(id="varies.mkv", source="varies.mkv")], tmp_path)
    assert film.fps == pytest.approx(60 * 12 / (30 + 29 * 4 + 1))
    assert "frame rate varies" in film.warnings[0]


def test_a_film_of_which_a_stage_drops_everything_is_warned_of_by_name_and_reason(films, workspace, caplog):
    probed = workspace.run("probe", Film, find_films(films, workspace), {}, partial(probe, folder=films))
    [record] = caplog.records
    [broken] = [entry for entry in probed if isinstance(entry, Dropped)]
    assert record.levelno == logging.WARNING
    assert (
        broken.id in record.getMessage() and "unreadable" in record.getMessage() and broken.why in record.getMessage()
    )
    caplog.clear()
    process = partial(split, folder=films, config=CONTENT, min_frames=1000)
    workspace.run("split", Scene, kept(probed), {}, process)
    assert len(caplog.records) == 2
    for film, record in zip(kept(probed), caplog.records):
        assert film.id in record.getMessage() and "1000 are needed" in record.getMessage()
    caplog.clear()
    workspace.run(
        "split", Scene, kept(probed), {"other": 1}, partial(split, folder=films, config=CONTENT, min_frames=1)
    )
    assert not caplog.records


def test_files_of_other_kinds_are_counted(films, workspace, caplog):
    with caplog.at_level(logging.INFO, "mask2dit"):
        find_films(films, workspace)
    assert "not videos by their suffix: 1 .txt" in caplog.text


def test_a_folder_without_films_is_an_error(tmp_path, workspace):
    with pytest.raises(FileNotFoundError, match="there is no folder of films"):
        find_films(tmp_path / "nowhere", workspace)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no video in"):
        find_films(tmp_path / "empty", workspace)


def test_films_lie_in_linked_folders_too_but_not_in_the_folder_of_the_run(tmp_path, workspace):
    for name in ("films/a.M4V", "films/._a.mp4", "elsewhere/b.mp4", "out/clips/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    (tmp_path / "films/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "films/again").symlink_to(".")
    assert [film.id for film in find_films(tmp_path / "films", workspace)] == ["a.M4V", "more/b.mp4"]
    (tmp_path / "films/clips").symlink_to(tmp_path / "out/clips")
    with pytest.raises(ValueError, match=r"clips/c\.mp4 links into output="):
        find_films(tmp_path / "films", workspace)


def test_films_are_cut_exactly_where_their_scenes_meet(probed, films, drawing):
    for film, results in split(kept(probed), films, CONTENT, min_frames=1):
        assert [(scene.start, scene.stop) for scene in results] == bounds(drawing, film.id)


def test_short_scenes_are_dropped_with_their_length(probed, films):
    results = dict((film.id, found) for film, found in split(kept(probed), films, CONTENT, min_frames=21))
    [short] = [entry for entry in results["red_scarf.mp4"] if isinstance(entry, Dropped)]
    assert (short.rule, short.why) == ("too_short", "9 frames, but 21 are needed")


def test_a_fade_to_black_is_found_by_the_fade_detector(tmp_path):
    bright = np.full((20, 64, 96, 3), 150.0)
    fade = np.concatenate([np.linspace(1, 0, 20), np.zeros(5), np.linspace(0, 1, 20)])[:, None, None, None]
    frames = np.concatenate([bright, 150 * fade * np.ones((1, 64, 96, 3)), bright]).astype(np.uint8)
    write_video(tmp_path / "fade.mp4", frames, 12)
    film = Film(id="fade.mp4", source="fade.mp4", width=96, height=64, fps=12, seconds=2.0, codec="h264", warnings=[])
    cuts = {}
    for name in ("content", "fades"):
        [(_, found)] = split([film], tmp_path, SplitConfig(detectors=[name]), min_frames=1)
        cuts[name] = [scene.start for scene in found[1:]]
    assert cuts["content"] == []
    assert len(cuts["fades"]) == 1 and 36 <= cuts["fades"][0] <= 48


def test_a_detector_of_ones_own_has_the_same_form(probed, films, tmp_path, monkeypatch):
    code = "def detect(reader):\n    return list(range(10, reader.num_frames, 10))\n"
    (tmp_path / "every_tenth.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    _, results = next(split(kept(probed), films, SplitConfig(detectors=["every_tenth:detect"]), min_frames=1))
    assert {scene.stop - scene.start for scene in results[:-1]} == {10}
    (tmp_path / "outside.py").write_text("def detect(reader):\n    return [reader.num_frames]\n")
    with pytest.raises(
        ValueError, match=r"outside:detect cuts bars/blue_scarf.mp4 at frame 244, but scenes can begin"
    ):
        next(split(kept(probed), films, SplitConfig(detectors=["outside:detect"]), min_frames=1))
    with pytest.raises(ValueError, match="'nowhere:detect' cannot be loaded"):
        next(split(kept(probed), films, SplitConfig(detectors=["nowhere:detect"]), min_frames=1))


def test_long_scenes_lose_parts_of_a_fixed_length_until_they_are_short():
    reader = ArrayReader(np.zeros((200, 2, 2, 3), np.uint8), fps=10)
    config = SplitConfig(force_cut_above=7, force_cut_length=5)
    cut, dissolve = Transition(40, 40), Transition(60, 70)
    assert scenes([cut], reader, config) == [(0, 40, 0), (40, 90, 0), (90, 140, 0), (140, 200, 0)]
    assert scenes([cut], reader, SplitConfig()) == [(0, 40, 0), (40, 200, 0)]
    assert scenes([dissolve], reader, config) == [(0, 60, 0), (70, 120, 10), (120, 170, 0), (170, 200, 0)]


def test_parts_shorter_than_a_frame_are_one_frame_long():
    reader = ArrayReader(np.zeros((3, 2, 2, 3), np.uint8), fps=10)
    assert scenes([], reader, SplitConfig(force_cut_above=0.02, force_cut_length=0.01)) == [
        (0, 1, 0),
        (1, 2, 0),
        (2, 3, 0),
    ]


def test_the_frames_of_a_transition_belong_to_no_scene_and_improbable_ones_are_noted(probed, films, monkeypatch):
    def detect(reader):
        return [Transition(30, 40, 0.9), Transition(60, 64, 0.3)]

    module = ModuleType("own_detector")
    module.detect = detect
    monkeypatch.setitem(sys.modules, "own_detector", module)
    _, (first, second) = next(split(kept(probed), films, SplitConfig(detectors=["own_detector:detect"]), min_frames=1))
    assert (first.start, first.stop, first.transition, first.doubts) == (0, 30, 0, [])
    assert (second.start, second.transition, second.doubts) == (40, 10, [62])


@pytest.mark.slow
def test_a_film_with_dissolves_is_split_into_its_shots(tmp_path):
    pictures = ("testsrc2=s=320x180:r=25:d=5", "mandelbrot=s=320x180:r=25", "smptebars=s=320x180:r=25:d=5")
    inputs = [argument for picture in pictures for argument in ("-f", "lavfi", "-i", picture)]
    mixes = (
        "[1:v]trim=duration=5,setpts=PTS-STARTPTS[m];[0:v][m]xfade=transition=fade:duration=1:offset=4[x];"
        "[x][2:v]xfade=transition=fade:duration=1:offset=8"
    )
    command = [get_ffmpeg_exe(), "-v", "error", *inputs, "-filter_complex", mixes, "dissolve.mp4"]
    subprocess.run(command, cwd=tmp_path, check=True)
    [(_, [result])] = probe([Entry(id="dissolve.mp4", source="dissolve.mp4")], tmp_path)
    [(_, found)] = split([result], tmp_path, SplitConfig(), min_frames=1)
    # The second scene shows frames 100 … 124 through the first, the third frames 200 … 224 through the second.
    assert [(scene.start, scene.stop) for scene in found] == [
        (0, pytest.approx(100, abs=4)),
        (pytest.approx(125, abs=4), pytest.approx(200, abs=4)),
        (pytest.approx(225, abs=4), 325),
    ]


def test_a_clip_can_be_a_frame_range_of_its_film(films, drawing, tmp_path):
    start, stop = bounds(drawing, "bars/blue_scarf.mp4")[1]
    scene = Scene(id="s", source="bars/blue_scarf.mp4", file="bars/blue_scarf.mp4", key="s", start=start, stop=stop)
    folder = tmp_path / "out"
    folder.mkdir()
    [(_, [written])] = write([scene], films, folder, WriteConfig(), {})
    [(_, [ranged])] = write([scene], films, folder, WriteConfig(encode=False), {})
    assert (ranged.num_frames, ranged.width, ranged.height) == (written.num_frames, written.width, written.height)
    assert (folder / ranged.path).samefile(films / scene.file) and len(list(folder.rglob("*.mp4"))) == 1
    of_range, of_file = (clip.open(folder).read([0, 7]).numpy().astype(int) for clip in (ranged, written))
    assert np.abs(of_range - of_file).mean() < 4


def texture(seed, height=64, width=96, frames=6):
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "borders, colour",
    [((10, 10, 0, 0), 0), ((0, 0, 12, 12), 0), ((8, 6, 4, 2), 255), ((7, 0, 0, 0), 10), ((0, 0, 0, 0), 0)],
)
def test_borders_are_found_to_the_row(borders, colour):
    top, bottom, left, right = borders
    frames = np.pad(texture(0), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=colour)
    assert find_borders(frames) == borders


def test_a_plain_sky_is_no_border():
    frames = texture(1)
    frames[:, :20] = (120, 180, 240)
    assert find_borders(frames) == (0, 0, 0, 0)


def test_a_black_film_has_no_borders():
    assert find_borders(np.zeros((4, 32, 32, 3), np.uint8)) == (0, 0, 0, 0)


def test_a_line_on_black_is_no_picture_with_borders():
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, 31:33] = texture(3, height=2, frames=4)
    assert find_borders(frames) == (0, 0, 0, 0)


def test_a_name_that_is_not_utf_8_is_listed(films, tmp_path, workspace):
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "caf\udce9.mp4").write_bytes((films / "red_scarf.mp4").read_bytes())
    [(_, [result])] = probe(find_films(folder, workspace), folder)
    assert result.rule == "unreadable" and "its name is not UTF-8" in result.why


def test_clips_lose_trimmed_frames_and_borders(films, drawing, tmp_path):
    start, stop = bounds(drawing, "bars/blue_scarf.mp4")[1]
    scene = Scene(id="s", source="bars/blue_scarf.mp4", file="bars/blue_scarf.mp4", key="s", start=start, stop=stop)
    [(_, [clip])] = write([scene], films, tmp_path, WriteConfig(trim_frames=3), {})
    assert (clip.start, clip.stop, clip.num_frames) == (start + 3, stop - 3, stop - start - 6)
    assert clip.crop == [drawing.BAR, 0, drawing.HEIGHT, drawing.WIDTH]
    assert (clip.width, clip.height, clip.fps) == (drawing.WIDTH, drawing.HEIGHT, drawing.FPS)
    drawn = drawing.draw(drawing.FILMS[scene.source][1], 3 / (stop - start - 1))
    written = open_video(tmp_path / clip.path).read([0])[0].numpy()
    assert np.abs(written.astype(int) - drawn).mean() < 4


def test_clips_can_be_scaled_down(films, tmp_path):
    scene = Scene(id="s", source="red_scarf.mp4", file="red_scarf.mp4", key="s", start=0, stop=20)
    [(_, [clip])] = write([scene], films, tmp_path, WriteConfig(max_short_side=64), {})
    assert isinstance(clip, Clip) and (clip.width, clip.height) == (96, 64)


@pytest.mark.parametrize("encode", [True, False])
def test_a_film_that_breaks_inside_loses_the_scenes_behind_only(films, drawing, damage, tmp_path, encode):
    damaged = tmp_path / "films"
    damaged.mkdir()
    (damaged / "a.mp4").write_bytes((films / "red_scarf.mp4").read_bytes()[:3000])
    damage(Path(shutil.copy(films / "red_scarf.mp4", damaged / "b.mp4")))
    [_, (_, [probed])] = probe([Entry(id=name, source=name) for name in ("a.mp4", "b.mp4")], damaged)
    assert isinstance(probed, Film)  # so that only decoding shows it
    last = bounds(drawing, "red_scarf.mp4")[-1]
    ranges = {"a.mp4": [(0, 20)], "b.mp4": [(0, 20), last]}
    found = [
        Scene(id=f"{name}#{start}", source=name, file=name, key=f"{name}#{start}", start=start, stop=stop)
        for name, of_film in ranges.items()
        for start, stop in of_film
    ]
    config = WriteConfig(encode=encode, remove_borders=False)
    opened, first, behind = (result for _, [result] in write(found, damaged, tmp_path, config, {}))
    assert isinstance(first, Clip) and first.is_range != encode
    for result, name in ((opened, "a.mp4"), (behind, "b.mp4")):
        assert isinstance(result, Dropped) and result.rule == "unreadable" and name in result.why


def test_frames_of_a_clip_come_a_few_at_a_time():
    asked = []

    class Reader(ArrayReader):
        def read(self, indices):
            asked.append(len(indices))
            return super().read(indices)

    reader = Reader(texture(2, frames=100))
    assert sum(1 for _ in cropped_frames(reader, 5, 95, (0, 0, 64, 96))) == 90
    assert max(asked) <= 16


@pytest.fixture
def shots(films, tmp_path):
    """Films that are cut already: a/shot_1, a/shot_2, a/shot_10 and a broken a/shot_3, b/shot_1."""
    for name in ("a/shot_1", "a/shot_2", "a/shot_10", "b/shot_1"):
        path = tmp_path / f"shots/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(films / "red_scarf.mp4")
    (tmp_path / "shots/a/shot_3.mp4").write_bytes(b"broken")
    return tmp_path / "shots"


def test_shots_of_a_folder_are_one_film_in_the_order_of_their_names_and_are_not_cut(shots, workspace):
    found = find_films(shots, workspace, "folder")
    assert [(entry.source, entry.id) for entry in found] == [
        *[("a", f"a/shot_{i}.mp4") for i in (1, 2, 3, 10)],
        ("b", "b/shot_1.mp4"),
    ]
    films = [film for _, [film] in probe(found, shots)]
    times = shot_times(films)
    length = films[0].seconds
    assert times["a/shot_2.mp4"] == length and times["b/shot_1.mp4"] == 0
    assert times["a/shot_10.mp4"] > 2 * length + 1000  # after one that cannot be read
    config = SplitConfig(detectors=["nowhere:detect"])
    for film, [scene] in split(kept(films), shots, config, min_frames=1, is_cut=True):
        assert (scene.source, scene.file, scene.start) == (film.source, film.id, 0)
        assert scene.stop == round(film.seconds * film.fps)


def test_a_list_gives_the_shots_of_films_and_their_order(shots, workspace, tmp_path):
    path = tmp_path / "shots.csv"
    path.write_text("film,path\nx,b/shot_1.mp4\nx,a/shot_2.mp4\ny,a/shot_1.mp4\n")
    found = find_films(shots, workspace, str(path))
    assert [(entry.source, entry.id) for entry in found] == [
        ("x", "b/shot_1.mp4"),
        ("x", "a/shot_2.mp4"),
        ("y", "a/shot_1.mp4"),
    ]
    path.write_text("film,path\nx,b/shot_1.mp4\nx,b/shot_9.mp4\n")
    with pytest.raises(ValueError, match=r"row 2: there is no film, or no shot .*b/shot_9.mp4"):
        find_films(shots, workspace, str(path))
