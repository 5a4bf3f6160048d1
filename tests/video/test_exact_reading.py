"""Frame i is the i-th that a player shows, for every container and codec: numbers are drawn into the frames."""

import gc
import logging
import os
import random
import subprocess
import sys

import av
import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.video import reading
from mask2dit.video.reading import FileReader, open_video

pytestmark = pytest.mark.slow

FRAMES = 90
WHOLE = [
    "closed.mp4",
    "faststart.mp4",
    "fragments.mp4",
    "opengop.mp4",
    "refresh.mp4",
    "interlaced.mp4",
    "full444.mp4",
    "late.mp4",
    "closed.mkv",
    "opengop.mkv",
    "closed.ts",
    "opengop.ts",
    "h264.m2ts",
    "h264.flv",
    "h264.avi",
    "raw.h264",
    "hevc.mp4",
    "hevc10.mov",
    "hevc.mkv",
    "hevc.ts",
    "mpeg4.avi",
    "mpeg4.mp4",
    "mpeg2.mpg",
    "mpeg2.ts",
    "mpeg2.mkv",
    "wmv2.wmv",
    "vp8.webm",
    "vp9.webm",
    "av1.mp4",
    "prores.mov",
    "mjpeg.avi",
    "ffv1.mkv",
    "flv1.flv",
    "gif.gif",
    "variable.mkv",
    "jitter.mkv",
    "film.mkv",
    "pq.mp4",
    "bt709.mp4",
]
# What a cut hides, or is lost by the encoder, has no frame; PyAV decoding in order tells.
PARTIAL = ["cut.mp4", "cut_open.mp4", "cut_hevc.mp4", "cut_hevc.mkv", "cut.ts", "packed.avi", "av1.mkv"]


def in_order(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def as_training_reads(num_frames):
    """Lists of indices in every order."""
    generator = random.Random(0)
    starts = [generator.randrange(num_frames - 25) for _ in range(6)]
    windows = [list(range(start, start + 25, 3)) for start in starts]
    return [*windows, list(range(num_frames))[::-7], [num_frames - 1], [5, 5, 70 % num_frames, 5], [0]]


@pytest.mark.parametrize("name", [*WHOLE, *PARTIAL])
def test_frames_are_those_that_a_player_shows(name, numbered, number):
    path = numbered(name)
    expected = in_order(path)
    reader, other = FileReader(path), FileReader(path)
    assert reader.num_frames == len(expected)
    if name in WHOLE:
        assert [number(image) for image in expected] == list(range(FRAMES))
    for indices in as_training_reads(reader.num_frames):
        frames = reader.read(indices).numpy()
        other.read(indices[-1:])
        assert [number(frame) for frame in frames] == [number(expected[index]) for index in indices]
        assert all(np.array_equal(frame, expected[index]) for frame, index in zip(frames, indices))


def test_what_a_cut_hides_is_not_read(numbered, number):
    reader = FileReader(numbered("cut.mp4"))
    assert number(reader.read([0])[0].numpy()) == 33  # 1.3 s of 25 frames a second
    assert reader.num_frames == FRAMES - 33


@pytest.mark.parametrize(
    "name",
    ["mirrored.mp4", "upside_down.mp4", "turned90.mp4", "turned180.mp4", "turned270.mkv", "turned_mirrored.mp4"],
)
def test_frames_are_upright_as_ffmpeg_shows_them(name, numbered):
    reader = open_video(numbered(name))
    shown = subprocess.run(
        [get_ffmpeg_exe(), "-v", "error", "-i", numbered(name), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    shown = np.frombuffer(shown, np.uint8).reshape(FRAMES, reader.height, reader.width, 3)
    frames = reader.read([0, 50]).numpy()
    assert frames.shape == (2, reader.height, reader.width, 3)
    # FFmpeg turns before it converts colours, which may round otherwise.
    assert np.abs(frames.astype(int) - shown[[0, 50]]).mean() < 1


def test_a_turn_by_another_angle_is_refused(numbered):
    with pytest.raises(ValueError, match=r"turned45.mp4 cannot be read: it asks players to turn it by -?45 degrees"):
        open_video(numbered("turned45.mp4"))


@pytest.mark.parametrize(
    "name, width, height", [("wide.mp4", 256, 64), ("narrow.mp4", 64, 64), ("turned_wide.mp4", 64, 256)]
)
def test_pixels_are_square(name, width, height, numbered):
    reader = open_video(numbered(name))
    assert (reader.width, reader.height) == (width, height)
    frames = reader.read([40]).numpy()
    assert frames.shape == (1, height, width, 3)
    if name == "wide.mp4":
        assert (
            np.abs(frames[0, :, ::2].astype(int) - open_video(numbered("closed.mp4")).read([40])[0].numpy()).mean() < 6
        )


@pytest.mark.parametrize(
    "name, fps, warned",
    [
        ("closed.mp4", 25, None),
        ("h264.avi", 25, None),
        ("jitter.mkv", 25, None),
        ("film.mkv", 24000 / 1001, None),
        ("variable.mkv", 90 * 25 / (30 + 59 * 4 + 1), "frame rate varies"),
        ("pq.mp4", 25, "HDR"),
        ("interlaced.mp4", 25, "interlaced"),
    ],
)
def test_the_rate_is_the_average_and_what_frames_do_not_show_is_warned_of_once(name, fps, warned, numbered, caplog):
    reading._warn_once.cache_clear()
    for _ in range(2):
        reader = open_video(numbered(name))
    assert reader.fps == pytest.approx(fps, rel=1e-6)
    assert len(reader.warnings) == len(caplog.records) == (warned is not None)
    if warned:
        assert caplog.records[0].levelno == logging.WARNING
        assert name in caplog.text and warned in caplog.text and warned in reader.warnings[0]


@pytest.mark.parametrize(
    "name", ["faststart.mp4", "fragments.mp4", "closed.mkv", "vp9.webm", "mpeg4.avi", "mpeg2.mpg", "wmv2.wmv"]
)
@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_a_file_cut_short_is_refused_whatever_the_container(name, kept, numbered, tmp_path):
    data = numbered(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*(cut short|damaged)"):
        FileReader(path)


def test_a_file_cut_between_two_frames_is_refused(numbered, tmp_path):
    with av.open(str(numbered("faststart.mp4"))) as container:
        middle = [packet.pos for packet in container.demux(video=0) if packet.size][45]
    path = tmp_path / "cut.mp4"
    path.write_bytes(numbered("faststart.mp4").read_bytes()[:middle])
    with pytest.raises(ValueError, match="45 of 90 frames are there"):
        FileReader(path)


@pytest.mark.parametrize("name", ["closed.ts", "mpeg2.ts"])
def test_a_recording_that_begins_between_key_frames_is_read_from_where_players_show_it(
    name, numbered, number, tmp_path
):
    data = numbered(name).read_bytes()
    path = tmp_path / name
    head = 188 * 3  # tables of the stream
    path.write_bytes(data[:head] + data[188 * (len(data) // 188 // 5) :])
    reader = FileReader(path)
    numbers = [number(frame) for frame in reader.read(range(reader.num_frames)).numpy()]
    assert 12 <= numbers[0] <= 36
    assert numbers == list(range(numbers[0], FRAMES))
    assert number(reader.read([30])[0].numpy()) == numbers[30]


def test_seeking_that_lands_elsewhere_changes_nothing(numbered, number, monkeypatch):
    monkeypatch.setattr(reading, "seek_packets", lambda container, stream, start: None)
    reader = FileReader(numbered("opengop.mp4"))
    assert [number(frame) for frame in reader.read([80, 3, 41]).numpy()] == [80, 3, 41]


@pytest.mark.parametrize("shift", [0, 1])
def test_packets_that_do_not_tell_the_frames_are_not_believed(shift, numbered, number, monkeypatch):
    index_packets = reading.index_packets

    def wrong(container, stream):
        index = index_packets(container, stream)
        index.times[shift:] = [time + 7 for time in index.times[shift:]]
        return index

    monkeypatch.setattr(reading, "index_packets", wrong)
    monkeypatch.setattr(reading, "_INDEXES", reading._Indexes())
    reader = FileReader(numbered("closed.mp4"))
    if shift == 0:  # the first frame gives it away
        assert number(reader.read([41])[0].numpy()) == 41
    else:
        with pytest.raises(ValueError, match="cannot be decoded at or near frames 41 to 41: other frames come out"):
            reader.read([41])


def test_readers_that_are_let_go_close_their_files(numbered, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(numbered("faststart.mp4").read_bytes()[:2000])
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for name in ("closed.mp4", "mpeg4.avi"):
            FileReader(numbered(name)).read([3])
        with pytest.raises(ValueError):
            FileReader(broken)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_decord_is_not_needed(numbered):
    code = (
        "import sys; sys.modules['decord'] = None\n"
        "from mask2dit.video import open_video\n"
        f"assert open_video({str(numbered('closed.mp4'))!r}).read([5]).shape == (1, 64, 128, 3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
