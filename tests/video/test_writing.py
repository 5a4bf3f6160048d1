import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw

from mask2dit.video import FileReader, contact_sheet, join_videos, write_clips, write_image, write_video, writing

NOISE = np.random.default_rng(0).integers(256, size=(30, 96, 128, 3), dtype=np.uint8)


def colour_frames(num_frames=5, height=48, width=96):
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for k, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 60)]):
        frames[:, :, k * width // 4 : (k + 1) * width // 4] = colour
    return frames


@pytest.fixture
def fake_ffmpeg(tmp_path_factory, monkeypatch):
    """Put a shell script in the place of ffmpeg; in it, "$REAL" is ffmpeg."""

    def install(script):
        path = tmp_path_factory.mktemp("bin") / "ffmpeg"
        path.write_text(f"#!/bin/sh\nREAL='{get_ffmpeg_exe()}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return install


@pytest.mark.parametrize("fps", [8, 24, 24000 / 1001])
@pytest.mark.parametrize("as_array", [True, False])
def test_a_video_keeps_its_frames_size_rate_and_colours(tmp_path, fps, as_array):
    frames = colour_frames()
    write_video(tmp_path / "video.mp4", frames if as_array else (frame for frame in frames), fps)
    reader = FileReader(tmp_path / "video.mp4")
    assert (reader.num_frames, reader.height, reader.width) == (5, 48, 96)
    assert reader.fps == pytest.approx(fps, abs=1e-3)
    centres = reader.read([0, 4])[:, 24, 12::24].int().numpy()
    assert np.abs(centres - frames[[0, 4], 24, 12::24].astype(int)).max() <= 4


@pytest.mark.parametrize("write", [write_video, lambda path, clip, *rest: write_clips([path], [clip], *rest)])
@pytest.mark.parametrize("full_chroma", [False, True])
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)])
def test_colours_are_converted_as_the_tags_of_stream_and_frame_say(tmp_path, write, full_chroma, colour):
    path = tmp_path / "colour.mp4"
    write(path, np.full((3, 64, 96, 3), colour, np.uint8), 8, full_chroma)
    with av.open(path) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        for tagged in (stream.codec_context, frame):  # the container's tags, and the bitstream's
            assert (tagged.colorspace, tagged.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
            assert (tagged.color_primaries, tagged.color_trc) == (1, 1)  # BT.709
    luma = 16 + 219 / 255 * np.dot((0.2126, 0.7152, 0.0722), colour)  # by BT.709, in 16 … 235
    assert bytes(frame.planes[0])[0] == pytest.approx(luma, abs=1.5)
    assert np.abs(frame.to_ndarray(format="rgb24")[32, 48].astype(int) - colour).max() <= 3


def test_full_chroma_keeps_the_colour_of_single_pixels(tmp_path):
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    frames[:, :, ::2] = (200, 40, 40)
    frames[:, :, 1::2] = (40, 40, 200)

    def error(**options):
        write_video(tmp_path / "video.mp4", frames, 8, **options)
        return np.abs(FileReader(tmp_path / "video.mp4").read([1])[0].int().numpy() - frames[1]).mean()

    assert error(full_chroma=True) < 5 < 30 < error()


def clips_of(count, num_frames=9):
    levels = np.linspace(20, 230, count * num_frames).astype(np.uint8).reshape(count, num_frames, 1, 1, 1)
    return list(np.broadcast_to(levels, (count, num_frames, 48, 64, 3)))


@pytest.mark.parametrize("fps", [8, 24000 / 1001])
@pytest.mark.parametrize("count", [1, 5])
def test_clips_written_together_are_videos_of_their_own(tmp_path, fps, count):
    clips, paths = clips_of(count), [tmp_path / f"{k}.mp4" for k in range(count)]
    write_clips(paths, clips, fps, full_chroma=True)
    assert sorted(tmp_path.iterdir()) == paths
    for path, clip in zip(paths, clips):
        reader = FileReader(path)
        assert reader.num_frames == 9 and reader.fps == pytest.approx(fps, abs=1e-3)
        assert np.abs(reader.read(range(9)).int().numpy() - clip).max() <= 3


@pytest.mark.parametrize(
    ("names", "clips", "message"),
    [
        (["a.mp4"], clips_of(2), "1 paths for 2 clips"),
        ([], [], "0 paths for 0 clips"),
        (["a.mp4", "b.mp4"], [clips_of(1)[0], clips_of(1, 5)[0]], "one shape and one folder"),
        (["a.mp4", "sub/b.mp4"], clips_of(2), "one shape and one folder"),
        (["a.avi"], clips_of(1), r"a\.avi"),
        (["a.mp4"], [np.zeros((9, 47, 64, 3), np.uint8)], "crop to 46x64"),
        (["a.mp4"], [np.zeros((9, 48, 64, 3))], "float64"),
        (["a.mp4"], [np.zeros((0, 48, 64, 3), np.uint8)], "no frames"),
    ],
)
def test_clips_that_cannot_be_written_together_are_refused(tmp_path, names, clips, message):
    with pytest.raises(ValueError, match=message):
        write_clips([tmp_path / name for name in names], clips, 8)
    assert not list(tmp_path.iterdir())


def test_clips_cut_short_by_an_ffmpeg_that_reports_success_are_an_error(tmp_path, fake_ffmpeg):
    clips = clips_of(3)
    fake_ffmpeg(f'head -c {2 * clips[0].size + 5 * clips[0][0].size} | "$REAL" "$@"')
    with pytest.raises(OSError, match="wrote 2 of 3 clips whole"):
        write_clips([tmp_path / f"{k}.mp4" for k in range(3)], clips, 8)
    assert not list(tmp_path.iterdir())


def test_joined_videos_show_exactly_the_pixels_of_their_clips(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for k, length in enumerate((9, 1, 2, 3, 25)):  # short ones have no frames that are decoded early
        frames = np.kron(rng.integers(256, size=(length, 6, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
        paths.append(tmp_path / f"{k}.mp4")
        write_video(paths[-1], frames, 24000 / 1001)
    join_videos(tmp_path / "all.mp4", paths)
    reader = FileReader(tmp_path / "all.mp4")
    assert reader.num_frames == 40 and reader.fps == pytest.approx(24000 / 1001, abs=1e-3)
    parts = [FileReader(path) for path in paths]
    expected = np.concatenate([part.read(range(part.num_frames)).numpy() for part in parts])
    assert (reader.read(range(40)).numpy() == expected).all()
    with av.open(str(tmp_path / "all.mp4")) as container:
        times = [packet.dts for packet in container.demux() if packet.dts is not None]
    assert times == sorted(set(times))


def test_videos_that_cannot_be_joined_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((2, 48, 64, 3), np.uint8), 8)
    write_video(tmp_path / "b.mp4", np.zeros((2, 32, 64, 3), np.uint8), 8)
    (tmp_path / "c.mp4").write_text("not a video")
    for names, message in (("", "no clips"), ("ab", r"b\.mp4 is 64x32"), ("ac", r"c\.mp4 is not a video")):
        with pytest.raises(ValueError, match=message):
            join_videos(tmp_path / "all.mp4", [tmp_path / f"{name}.mp4" for name in names])
    assert not (tmp_path / "all.mp4").exists()


def test_sizes_that_are_even_but_no_multiple_of_16_are_not_resized(tmp_path):
    write_video(tmp_path / "video.mp4", np.zeros((3, 50, 70, 3), np.uint8), 8)
    reader = FileReader(tmp_path / "video.mp4")
    assert (reader.height, reader.width) == (50, 70)


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "video.mp4", NOISE[:1], 8)
    assert FileReader(tmp_path / "video.mp4").num_frames == 1


def test_frames_are_encoded_as_they_arrive(tmp_path):
    files_seen = []

    def frames():
        for frame in NOISE:
            files_seen.append(len(list(tmp_path.iterdir())))
            yield frame

    write_video(tmp_path / "video.mp4", frames(), 8)
    assert files_seen[0] == 0 and files_seen[-1] == 1


def test_frames_that_are_views_with_odd_strides_are_written_right(tmp_path):
    write_video(tmp_path / "video.mp4", colour_frames()[:, :, ::-1], 8)
    red = FileReader(tmp_path / "video.mp4").read([0])[0, 24, 84]
    assert np.abs(red.int().numpy() - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(("size", "message"), [((47, 64), "47x64.*crop to 46x64"), ((48, 63), "48x63.*crop to 48x62")])
def test_odd_sizes_are_refused(tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", np.zeros((2, *size, 3), np.uint8), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames to write"),
        (np.zeros((2, 48, 64, 3)), r"but got float64 \(48, 64, 3\)"),
        (np.zeros((48, 64, 3), np.uint8), r"but got uint8 \(64, 3\)"),
        (
            [NOISE[0], NOISE[1], NOISE[2, :48]],
            r"frame 2 is uint8 \(48, 128, 3\), but frame 0 was uint8 \(96, 128, 3\)",
        ),
        ([NOISE[0], NOISE[1].astype(np.float32)], "frame 1 is float32"),
    ],
)
def test_frames_that_cannot_make_a_video_are_refused_and_leave_nothing(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "video.mp4", NOISE, fps)


def test_another_container_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"video\.avi"):
        write_video(tmp_path / "video.avi", NOISE, 8)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, BrokenPipeError])
def test_an_error_among_the_frames_comes_through_and_leaves_the_old_video(tmp_path, error):
    path = tmp_path / "video.mp4"
    path.write_text("the old one")

    def frames():
        yield from NOISE[:5]
        raise error("from the model")

    with pytest.raises(error, match="from the model"):
        write_video(path, frames(), 8)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_grow_is_an_error_with_ffmpegs_message(tmp_path, fake_ffmpeg):
    # What a full disk does to ffmpeg, without one: no file may exceed 100 blocks.
    fake_ffmpeg('trap \'\' XFSZ; ulimit -f 100; exec "$REAL" "$@"')
    with pytest.raises(OSError, match=r"failed to write \S+video.mp4 .*(.|\n)*File too large"):
        write_video(tmp_path / "video.mp4", NOISE, 8)
    assert not list(tmp_path.iterdir())


def test_an_ffmpeg_that_dies_is_an_error_with_its_message(tmp_path, fake_ffmpeg):
    fake_ffmpeg("head -c 1000 >/dev/null; echo 'no encoder here' >&2; exit 3")
    with pytest.raises(OSError, match=r"exit status 3\): no encoder here"):
        write_video(tmp_path / "video.mp4", NOISE, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames_taken", [2, 29])
def test_frames_lost_by_an_ffmpeg_that_reports_success_are_an_error(tmp_path, fake_ffmpeg, frames_taken):
    size = frames_taken * NOISE[0].size
    fake_ffmpeg(f'case "$*" in *rawvideo*) head -c {size} | "$REAL" "$@" ;; *) exec "$REAL" "$@" ;; esac')
    with pytest.raises(OSError, match=f"wrote {frames_taken} of "):
        write_video(tmp_path / "video.mp4", NOISE, 8)
    assert not list(tmp_path.iterdir())


def test_a_relative_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30").mkdir()
    write_video("12:30/video.mp4", NOISE[:2], 8)
    assert FileReader("12:30/video.mp4").num_frames == 2


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        write_video(tmp_path / "nowhere" / "video.mp4", NOISE, 8)


def test_an_image_is_written_as_png_without_loss(tmp_path):
    write_image(tmp_path / "a.png", Image.fromarray(NOISE[0]))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), NOISE[0])


def levels_in_rows(sheet, step):
    """The brightness of each thumbnail, row by row; only thumbnails are wide and of one grey, a multiple of `step`."""
    pixels = np.asarray(sheet)[..., 0].astype(int)
    rows = []
    for line in pixels:
        changes = np.flatnonzero(np.diff(line)) + 1
        runs = [run for run in np.split(line, changes) if len(run) >= 40 and run[0] % step == 0 and run[0] < 245]
        levels = [int(run[0]) for run in runs]
        if levels and (not rows or rows[-1] != levels):
            rows.append(levels)
    return rows


def grey_scene(num_frames, first=0, step=10, size=(20, 30)):
    levels = (first + step * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, *size, 3))


def test_each_row_shows_its_scene_from_the_first_frame_to_the_last():
    scenes = [grey_scene(11), grey_scene(3, first=120), grey_scene(1, first=240, size=(48, 30))]
    sheet = contact_sheet(scenes, columns=6, thumb_width=60)
    assert levels_in_rows(sheet, 10) == [[0, 20, 40, 60, 80, 100], [120, 130, 140], [240]]


@pytest.fixture
def drawn(monkeypatch):
    """What is written on sheets: (text, right edge)."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def record(self, position, text, font, **kwargs):
        texts.append((text, position[0] + font.getlength(text)))
        return draw_text(self, position, text, font=font, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def test_scenes_are_numbered_and_captioned_below_the_title(drawn):
    contact_sheet([grey_scene(4)] * 2, ["A fox wakes.", "It runs."], title="The fox")
    assert [text for text, _ in drawn] == ["The fox", "Scene 1", "A fox wakes.", "Scene 2", "It runs."]


def test_given_scenes_are_marked(drawn):
    contact_sheet([grey_scene(4)] * 3, given=[0, 2])
    assert [text for text, _ in drawn] == ["Scene 1 (given)", "Scene 2", "Scene 3 (given)"]


def test_long_captions_are_cut_to_two_lines_inside_the_sheet(drawn):
    caption = " ".join(f"word{k}" for k in range(60))
    sheet = contact_sheet([grey_scene(4)], [caption], columns=3, thumb_width=100)
    _, (first, first_edge), (second, second_edge) = drawn
    assert max(first_edge, second_edge) <= sheet.width - writing.MARGIN
    assert second.endswith("…")
    assert caption.startswith(f"{first} {second[:-1]}")


def test_a_word_longer_than_the_sheet_is_cut(drawn):
    sheet = contact_sheet([grey_scene(4)], ["x" * 500], columns=2, thumb_width=100)
    (text, edge) = drawn[-1]
    assert text.endswith("x…") and edge <= sheet.width - writing.MARGIN


def test_captions_keep_to_characters_that_the_font_has(drawn):
    contact_sheet([grey_scene(4)], ["Café — a “long” day – Mask²DiT"])
    assert drawn[-1][0] == "Cafe - a “long” day - Mask2DiT"


def test_a_scene_without_a_caption_takes_no_room_for_one(drawn):
    bare, empty, full = (contact_sheet([grey_scene(4)], captions) for captions in (None, [""], ["A fox."]))
    assert bare.height == empty.height < full.height


def test_small_frames_are_enlarged():
    sheet = contact_sheet([np.full((2, 64, 96, 3), 90, np.uint8)], thumb_width=240)
    assert (np.asarray(sheet) == 90).all(-1).sum() >= 2 * 240 * 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenes": []}, "at least one scene"),
        ({"scenes": [NOISE], "captions": ["a", "b"]}, "2 captions for 1 scenes"),
        ({"scenes": [NOISE], "columns": 1}, "columns must be at least 2"),
        ({"scenes": [NOISE, NOISE / 255]}, r"scene 2 must be uint8 \(F, H, W, 3\).*got float64"),
        ({"scenes": [NOISE[:0]]}, "scene 1 must be"),
    ],
)
def test_sheets_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)
