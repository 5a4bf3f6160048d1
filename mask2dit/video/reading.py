"""One small interface for video files and arrays, and reading scenes from them."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from mask2dit.video.frames import choose_frames, resize_and_crop
from mask2dit.video.index import (
    DamagedError,
    FrameIndex,
    Start,
    frames_from,
    index_frames,
    index_packets,
    is_cut_matroska,
    packets_from,
    seek_packets,
    shown_frames,
)

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# Decoding continues from the last decoded frame, unless a key frame is more than this many frames after it.
FRAMES_BEFORE_SEEKING = 16
# Frames whose indexes are kept in memory, so that a process indexes a film once rather than for each of its frame ranges.
KEPT_FRAMES = 1_000_000
NEARLY_ZERO = 0.01  # relative to the other entries of a display matrix
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # H.273, table 3


class VideoReader(Protocol):
    """The interface of a video.

    Attributes:
        num_frames: frames in the video.
        fps: frames per second.
        height, width: size of a frame in pixels.
    """

    num_frames: int
    fps: float
    height: int
    width: int

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices`, which may repeat and come in any order, as `uint8 (F, H, W, 3)`.

        Raises:
            IndexError: if an index is not in `0 … num_frames - 1`.
        """
        ...


class _Indexes:
    """The indexes of the files that this process opened last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, FrameIndex] = OrderedDict()
        self._lock = Lock()

    @staticmethod
    def key(path: Path) -> tuple:
        """Identifies a file and its content."""
        status = path.stat()
        return str(path.absolute()), status.st_size, status.st_mtime_ns

    def get(self, key: tuple) -> "FrameIndex | None":
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple, index: FrameIndex) -> None:
        with self._lock:
            self._kept[key] = index
            while len(self._kept) > 1 and sum(len(kept.times) for kept in self._kept.values()) > KEPT_FRAMES:
                self._kept.popitem(last=False)


_INDEXES = _Indexes()


class FileReader:
    """A `VideoReader` of a video file, by PyAV. Frame i is the i-th frame that a player shows.

    Edit lists, rotation and mirroring are applied as the file specifies. For pixels that are not square, the width is scaled.
    Frames are indexed when the file is first opened (`mask2dit.video.index`), and every frame that is read is checked against
    the index. Decoding uses one thread, since data loaders run a reader in each worker. A reader is not thread-safe.

    Args:
        path: the video file.

    Attributes:
        codec: FFmpeg's name of the codec.
        warnings: differences from what a player shows, and a variable frame rate, as sentences.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is a folder, is empty, cannot be decoded as a video, or is cut short and its container shows
            it.
    """

    _container: "InputContainer"
    _stream: "VideoStream"
    _index: FrameIndex
    _frames: "Iterator[av.VideoFrame] | None"

    def __init__(self, path: str | os.PathLike):
        # Imported here, since it loads FFmpeg's libraries, and most of the package never opens a video.
        import av

        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"video {self.path} does not exist; check the path and the folder it starts from")
        if self.path.is_dir():
            raise ValueError(f"video {self.path} is a folder; give the path of one video file")
        if self.path.stat().st_size == 0:
            raise ValueError(f"video {self.path} is empty (0 bytes); download or write it again")
        try:
            self._key = _INDEXES.key(self.path)
            self._open()
            if self._container.format.name.startswith("matroska") and is_cut_matroska(self.path):
                raise DamagedError("the file is shorter than its header says, so it is cut short")
            first = self._make_index()
        except (av.FFmpegError, DamagedError) as error:
            raise ValueError(
                f"video {self.path} cannot be read: {_reason(error)}; check that it plays, then download or encode it again"
            ) from error
        self._orientation = _orientation(first, self.path)
        aspect = self._stream.sample_aspect_ratio or 1
        self._size = (max(1, round(first.width * aspect)), first.height)
        self.width, self.height = self._size[::-1] if self._orientation[0] else self._size
        self.num_frames, self.codec = len(self._index.times), self._stream.codec_context.codec.canonical_name
        fps = self._index.fps(self._stream.time_base, self._stream.average_rate or self._stream.guessed_rate)
        if fps is None:
            raise ValueError(f"video {self.path} cannot be read: it has no frame rate; encode it again")
        self.fps = fps
        self.warnings = tuple(self._find_warnings(first))

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices` as `uint8 (F, H, W, 3)`.

        Raises:
            IndexError: if an index is not in `0 … num_frames - 1`.
            ValueError: if frames cannot be decoded.
        """
        import av

        indices = _checked_indices(indices, self.num_frames, f"video {self.path}")
        output = torch.empty(len(indices), self.height, self.width, 3, dtype=torch.uint8)
        try:
            try:
                self._read_into(output, indices)
            except (av.FFmpegError, DamagedError) as error:
                if not self._index.starts:
                    raise
                # The packets were misleading, or the file is damaged; decoding in order shows which.
                index = self._index_frames()
                if index.times != self._index.times:
                    raise DamagedError("other frames come out than its packets tell") from error
                self._index = index
                self._read_into(output, indices)
        except (av.FFmpegError, DamagedError) as error:
            self._frames = None
            raise ValueError(
                f"video {self.path} cannot be decoded at or near frames {min(indices)} to {max(indices)}: {_reason(error)}; "
                "the file is damaged: download or encode it again, or leave it out"
            ) from error
        return output

    def _make_index(self) -> "av.VideoFrame":
        """Index the file, by its packets if the first frame agrees with them. Returns the first frame."""
        import av

        known = _INDEXES.get(self._key)
        index = known or index_packets(self._container, self._stream)
        if index is not None:
            self._index = index
            try:
                first = self._decode_to(0)
                _INDEXES.put(self._key, index)
                return first
            except (av.FFmpegError, DamagedError):
                pass  # decoding in order shows whether the file is damaged or only the index is wrong
        self._index = self._index_frames()
        return self._decode_to(0)

    def _read_into(self, output: torch.Tensor, indices: list[int]) -> None:
        places: dict[int, list[int]] = {}
        for place, number in enumerate(indices):
            places.setdefault(number, []).append(place)
        for number in sorted(places):
            output[places[number]] = torch.from_numpy(self._picture(self._decode_to(number)))

    def _picture(self, frame: "av.VideoFrame") -> np.ndarray:
        """A frame as a player shows it, `(H, W, 3)`."""
        width, height = self._size
        picture = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
        is_transposed, is_upside_down, is_mirrored = self._orientation
        if is_transposed:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[:: -1 if is_upside_down else 1, :: -1 if is_mirrored else 1])

    def _decode_to(self, number: int) -> "av.VideoFrame":
        """Frame `number`, decoded from the last decoded frame on, or from a key frame if that is shorter."""
        start = self._index.start_for(number)
        if (
            self._frames is None
            or number < self._number
            or (start is not None and start.frame > self._number + FRAMES_BEFORE_SEEKING)
        ):
            self._frames = self._frames_from(start)
            self._number = start.frame - 1 if start else -1
        while self._number < number:
            self._last = next(self._frames, None)
            self._number += 1
            if self._last is None or self._last.pts != self._index.times[self._number]:
                raise DamagedError(f"frame {self._number} does not come out of the decoder")
        assert self._last is not None
        return self._last

    def _frames_from(self, start: Start | None) -> "Iterator[av.VideoFrame]":
        if start is None:
            self._open()
            return shown_frames(self._container, self._stream)
        packets = seek_packets(self._container, self._stream, start)
        if packets is None:
            self._open()
            packets = packets_from(self._container.demux(self._stream), start)
        return frames_from(packets, self._stream, start.pts)

    def _index_frames(self) -> FrameIndex:
        self._open()
        index = index_frames(self._container, self._stream)
        self._open()
        _INDEXES.put(self._key, index)
        return index

    def _open(self) -> None:
        import av
        from av.stream import Disposition

        self._close()
        # An absolute path, since FFmpeg would take a folder with a colon in its name for a protocol.
        self._container = av.open(str(self.path.absolute()), metadata_errors="replace")
        stream = self._container.streams.best("video")
        if self._container.format.name == "tty":
            raise DamagedError("it is a text")  # FFmpeg opens a .txt as a terminal recording
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            raise DamagedError("there is no video in it")
        self._stream = stream
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._frames, self._number, self._last = None, -1, None

    def _close(self) -> None:
        # Explicit, since PyAV's containers are reference cycles that keep files and decoders until garbage collection.
        if hasattr(self, "_container"):
            self._container.close()

    __del__ = _close

    def _find_warnings(self, first: "av.VideoFrame") -> Iterator[str]:
        if self._index.is_variable:
            yield (
                f"its frame rate varies ({self.fps:.6g} frames per second on average), so that frames at a fixed stride are "
                "not evenly spaced in time; encode it at a constant rate"
            )
        if first.color_trc in HDR_TRANSFERS:
            yield f"it is HDR ({HDR_TRANSFERS[first.color_trc]}), which is read without tone mapping; convert it to SDR"
        if first.interlaced_frame or self._stream.codec_context.field_order > 1:
            yield "it is interlaced, and is read without deinterlacing; deinterlace it"


class ArrayReader:
    """A `VideoReader` of frames in memory.

    Args:
        frames: `uint8 (F, H, W, 3)`, a NumPy array or a tensor.
        fps: frames per second; the default is the model's rate.

    Raises:
        ValueError: if `frames` is not uint8 of shape (F, H, W, 3) with at least one frame.
    """

    def __init__(self, frames: np.ndarray | torch.Tensor, fps: float = 8.0):
        if isinstance(frames, torch.Tensor):
            frames = frames.cpu().numpy()
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise ValueError(f"frames must be uint8 (F, H, W, 3) and not empty, but got {frames.dtype} {frames.shape}")
        self._frames = frames
        self.num_frames, self.height, self.width = frames.shape[:3]
        self.fps = fps

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices` as a copy, `uint8 (F, H, W, 3)`."""
        return torch.from_numpy(self._frames[_checked_indices(indices, self.num_frames, "the array")])


class RangeReader:
    """A `VideoReader` of a frame range and a part of the picture of another.

    Args:
        reader: the whole video.
        start, stop: the range shows frames start … stop - 1; None: from the first frame, to the last.
        crop: top, left, height and width of the part in pixels; None: the whole picture.

    Raises:
        ValueError: if the range or the part is not within the video.
    """

    def __init__(
        self,
        reader: VideoReader,
        start: int | None = None,
        stop: int | None = None,
        crop: Sequence[int] | None = None,
    ):
        start, stop = start or 0, reader.num_frames if stop is None else stop
        top, left, height, width = (0, 0, reader.height, reader.width) if crop is None else crop
        if not 0 <= start < stop <= reader.num_frames:
            raise ValueError(
                f"frames {start} to {stop - 1} were asked for, but the video has frames 0 to {reader.num_frames - 1}"
            )
        if min(top, left) < 0 or min(height, width) < 1 or top + height > reader.height or left + width > reader.width:
            raise ValueError(
                f"rows {top} to {top + height - 1} and columns {left} to {left + width - 1} were asked for, but the "
                f"picture has {reader.height} rows and {reader.width} columns"
            )
        self._reader, self._start = reader, start
        self._rows, self._columns = slice(top, top + height), slice(left, left + width)
        self.num_frames, self.fps, self.height, self.width = stop - start, reader.fps, height, width

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices` of the range, `uint8 (F, H, W, 3)`."""
        indices = _checked_indices(indices, self.num_frames, "the frame range")
        return self._reader.read([self._start + i for i in indices])[:, self._rows, self._columns]


def open_video(source: str | os.PathLike | np.ndarray | torch.Tensor) -> VideoReader:
    """A reader of `source`: the path of a video file, or frames as `uint8 (F, H, W, 3)`.

    Raises:
        TypeError: if `source` is neither.
        FileNotFoundError, ValueError: as `FileReader` and `ArrayReader` raise them.
    """
    if isinstance(source, str | os.PathLike):
        reader = FileReader(source)
        for warning in reader.warnings:
            _warn_once(f"video {source}: {warning}")
        return reader
    if isinstance(source, np.ndarray | torch.Tensor):
        return ArrayReader(source)
    raise TypeError(f"a video is a path or an array (F, H, W, 3), but got {type(source).__name__}")


def read_scene(
    source: str | os.PathLike | np.ndarray | torch.Tensor,
    num_frames: int,
    height: int,
    width: int,
    max_stride: int = 3,
    start: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One scene as input of the model: frames chosen by `choose_frames`, resized by `resize_and_crop`.

    Args:
        source: the path of a video file, or frames as `uint8 (F, H, W, 3)`.
        num_frames, max_stride, start, generator: see `choose_frames`.
        height, width: the target size in pixels.

    Returns:
        `float32 (num_frames, 3, height, width)` in [-1, 1].

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the video cannot be read or is too short; the message names the path.
    """
    reader = open_video(source)
    name = str(source) if isinstance(source, str | os.PathLike) else "the array"
    indices = choose_scene(range(reader.num_frames), name, num_frames, max_stride, start, generator)
    return resize_and_crop(reader.read(indices), height, width)


def choose_scene(
    available: range,
    name: str,
    num_frames: int,
    max_stride: int = 3,
    start: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Indices of one scene's frames among the available ones, with a warning if another scene would fit in the rest.

    Args:
        available: indices of the frames that the scene may take.
        name: name of the video, for messages.
        num_frames, max_stride, start, generator: see `choose_frames`.

    Raises:
        ValueError: if there are too few frames; the message names the video.
    """
    try:
        indices = choose_frames(len(available), num_frames, max_stride, start, generator)
    except ValueError as error:
        raise ValueError(f"no scene can be taken from {name}: {error}") from error
    if len(available) - (indices[-1] - indices[0] + 1) >= num_frames:
        logger.warning(
            "%s is longer than a scene: of its frames %d to %d, only %d to %d are used. If it holds several scenes, cut it "
            "into one video per scene.",
            name,
            available[0],
            available[-1],
            available[indices[0]],
            available[indices[-1]],
        )
    return [available[index] for index in indices]


def _orientation(frame: "av.VideoFrame", path: Path) -> tuple[bool, bool, bool]:
    """The operations to show a frame: whether to transpose it, then to flip it vertically, and to mirror it horizontally.

    The display matrix maps the pixel (x, y) to (a x + c y, b x + d y), as in ISO/IEC 14496-12, section 6.2.2.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if max(abs(b), abs(c)) < NEARLY_ZERO * min(abs(a), abs(d)):
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) < NEARLY_ZERO * min(abs(b), abs(c)):
        return True, b < 0, c < 0
    raise ValueError(
        f"video {path} cannot be read: it asks players to turn it by {frame.rotation} degrees, but only multiples of 90 can "
        "be applied; encode it again"
    )


def _reason(error: Exception) -> str:
    """The reason of an error, as the end of a sentence."""
    import av

    if isinstance(error, av.InvalidDataError):
        return "it is not a video, or it is damaged or cut short"
    return getattr(error, "strerror", None) or str(error)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _checked_indices(indices: Sequence[int], num_frames: int, name: str) -> list[int]:
    # NumPy would count negative indices from the end, which would hide a miscalculated index.
    outside = [index for index in indices if not 0 <= index < num_frames]
    if outside:
        raise IndexError(f"{name} has frames 0 to {num_frames - 1}, but frame {outside[0]} was asked for")
    return list(indices)
