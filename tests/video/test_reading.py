import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.video import ArrayReader, FileReader, open_video, read_scene, write_video

FPS = 12


def numbered_frames(num_frames, height=48, width=64):
    """Grey frames whose brightness tells their index: 4 k."""
    return np.broadcast_to(
        (4 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, height, width, 3)
    )


def numbers(frames):
    return (frames.float().mean((1, 2, 3)) / 4).round().int().tolist()


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(60), FPS)
    return path


def test_importing_the_package_loads_no_video_library():
    code = "import sys, mask2dit.video; sys.exit(bool({'av', 'imageio', 'imageio_ffmpeg'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_tells_its_length_rate_and_size(clip):
    reader = FileReader(clip)
    assert (reader.num_frames, reader.fps, reader.height, reader.width) == (60, FPS, 48, 64)


def test_exactly_the_frames_asked_for_are_read_in_the_order_asked_for(clip):
    indices = [0, 59, 3, 3, 31, 30, 58]
    frames = FileReader(clip).read(indices)
    assert frames.dtype == torch.uint8
    assert frames.shape == (7, 48, 64, 3)
    assert numbers(frames) == indices


@pytest.mark.parametrize("index", [-1, 60])
def test_an_index_outside_is_refused(clip, index):
    for reader in (FileReader(clip), ArrayReader(numbered_frames(60))):
        with pytest.raises(IndexError, match=f"frames 0 to 59, but frame {index} was"):
            reader.read([0, index])


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.mp4"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path} does not exist")):
        FileReader(path)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is a folder")):
        FileReader(tmp_path)


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(ValueError, match=re.escape(f"{path} is empty")):
        FileReader(path)


# FFmpeg opens a .txt as the video of a terminal, 25 frames a second.
@pytest.mark.parametrize("name", ["text.mp4", "text.txt"])
def test_a_text_is_not_a_video(tmp_path, name):
    path = tmp_path / name
    path.write_text("hello world\n" * 500)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        FileReader(path)


def test_sound_alone_is_not_a_video(tmp_path):
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        FileReader(path)


# The index of an mp4 lies at its end, unless it was moved to the start for streaming: then a cut file still opens.
@pytest.mark.parametrize("index_first", [False, True])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_file_cut_short_is_refused(clip, tmp_path, index_first, kept):
    if index_first:
        ffmpeg("-i", clip, "-c", "copy", "-movflags", "+faststart", tmp_path / "moved.mp4")
        clip = tmp_path / "moved.mp4"
    data = clip.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        FileReader(path)


def test_damaged_frames_are_named_with_the_file(tmp_path):
    path = tmp_path / "damaged.mp4"
    noise = np.random.default_rng(0).integers(256, size=(60, 48, 64, 3), dtype=np.uint8)
    write_video(path, noise, FPS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 10_000] = bytes(10_000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be decoded at or near frames 20 to 40"):
        FileReader(path).read([40, 20, 30])


def test_a_reader_goes_on_after_frames_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "damaged.mp4"
    noise = np.random.default_rng(0).integers(256, size=(60, 48, 64, 3), dtype=np.uint8)
    write_video(path, noise, FPS)
    before = FileReader(path).read([3])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 10_000] = bytes(10_000)
    path.write_bytes(data)
    reader = FileReader(path)
    with pytest.raises(ValueError, match="near frames 59 to 59"):
        reader.read([59])
    assert torch.equal(reader.read([3]), before)


@pytest.mark.parametrize("convert", [lambda frames: frames, lambda frames: torch.from_numpy(frames.copy())])
def test_an_array_is_read_like_a_file(convert):
    reader = open_video(convert(numbered_frames(20)))
    assert (reader.num_frames, reader.fps, reader.height, reader.width) == (20, 8.0, 48, 64)
    assert numbers(reader.read([7, 0, 7])) == [7, 0, 7]


def test_frames_read_from_an_array_are_a_copy():
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    ArrayReader(frames).read([0]).fill_(9)
    assert not frames.any()


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), torch.zeros(0, 4, 4, 3, dtype=torch.uint8)]
)
def test_an_array_of_another_kind_is_refused_with_what_it_is(frames):
    with pytest.raises(ValueError, match=re.escape(f"but got {np.asarray(frames).dtype} {tuple(frames.shape)}")):
        open_video(frames)


def test_a_source_that_is_neither_path_nor_array_is_refused():
    with pytest.raises(TypeError, match="got list"):
        open_video([np.zeros((4, 4, 3), np.uint8)])


@pytest.mark.parametrize("as_text", [True, False])
def test_a_scene_is_read_from_the_middle_at_the_largest_stride(clip, as_text):
    scene = read_scene(str(clip) if as_text else clip, 9, 32, 48)
    assert scene.shape == (9, 3, 32, 48)
    assert scene.dtype == torch.float32
    assert numbers((scene + 1) * 127.5) == list(range(17, 42, 3))


def test_a_scene_of_an_array_equals_the_scene_of_its_file(clip):
    torch.testing.assert_close(
        read_scene(numbered_frames(60), 9, 32, 48), read_scene(clip, 9, 32, 48), atol=0.02, rtol=0
    )


def test_a_random_scene_follows_its_generator(clip):
    first, second, other = (
        read_scene(clip, 5, 8, 8, start="random", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_video_too_short_is_named_with_its_length_and_what_is_needed(clip):
    with pytest.raises(ValueError, match=re.escape(str(clip)) + ".* has 60 frames, but 61 are needed"):
        read_scene(clip, 61, 32, 48)
    with pytest.raises(ValueError, match=r"the array.* has 2 frames, but 3 are needed"):
        read_scene(numbered_frames(2), 3, 32, 48)


def ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


@pytest.mark.parametrize("total, warned", [(25, False), (33, False), (34, True)])
def test_a_video_with_room_for_a_further_scene_is_warned_of(caplog, total, warned):
    read_scene(numbered_frames(total), 9, 32, 48)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
