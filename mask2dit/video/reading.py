"""Video files and arrays behind one small interface, and scenes read from them."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from mask2dit.video.frames import choose_frames, resize_and_crop

logger = logging.getLogger(__name__)


class VideoReader(Protocol):
    """What the package asks of a video.

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


class DecordReader:
    """A `VideoReader` of a video file.

    A file cut short is refused here where its container gives the cut away, as mp4 does; decord never says that the
    last frames are missing.

    Args:
        path: the video file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, is empty, or is not a video that can be decoded.
    """

    def __init__(self, path: str | os.PathLike):
        # Here and not above: decord loads FFmpeg's libraries, and most of the package never opens a video.
        import decord

        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"video {self.path} does not exist; check the path and the folder it starts from")
        if self.path.is_dir():
            raise ValueError(f"video {self.path} is a folder; give the path of one video file")
        if self.path.stat().st_size == 0:
            raise ValueError(f"video {self.path} is empty (0 bytes); download or write it again")
        try:
            # Absolute, or FFmpeg takes a folder with a colon in its name for a protocol. One thread: data loaders
            # run a reader in each worker. fault_tol: without it decord silently puts copies of a neighbour in place
            # of frames that it could not decode; one such frame is borne, more are an error.
            path = str(self.path.absolute())
            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=1)
            self.num_frames = len(self._reader)
            self.fps = float(self._reader.get_avg_fps())
            # decord tells the size only with a frame. Decoding one also unmasks a text file, which FFmpeg opens
            # as a video of a terminal.
            self.height, self.width = self._reader[0].shape[:2]
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"video {self.path} cannot be read: it is not a video, or it is damaged or cut short; "
                "check that it plays, then download or encode it again"
            ) from error

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices` as `uint8 (F, H, W, 3)`.

        Raises:
            IndexError: if an index is not in `0 … num_frames - 1`.
            ValueError: if frames cannot be decoded. Open the file anew after that: decord stays broken.
        """
        import decord

        indices = _checked_indices(indices, self.num_frames, f"video {self.path}")
        try:
            with decord.bridge.use_torch():
                return self._reader.get_batch(indices)
        except (decord.DECORDError, decord.DECORDLimitReachedError) as error:
            # decord decodes ahead of what it is asked for, so it cannot say at which frame it failed.
            raise ValueError(
                f"video {self.path} cannot be decoded at or near frames {min(indices)} to {max(indices)}; "
                "the file is damaged: download or encode it again, or leave it out"
            ) from error


class ArrayReader:
    """A `VideoReader` of frames in memory.

    Args:
        frames: `uint8 (F, H, W, 3)`, a NumPy array or a tensor.
        fps: frames per second; the default is the rate at which the model generates.

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


def open_video(source: str | os.PathLike | np.ndarray | torch.Tensor) -> VideoReader:
    """A reader of `source`: the path of a video file, or frames as `uint8 (F, H, W, 3)`.

    Raises:
        TypeError: if `source` is neither.
        FileNotFoundError, ValueError: as `DecordReader` and `ArrayReader` raise them.
    """
    if isinstance(source, str | os.PathLike):
        return DecordReader(source)
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
    """One scene as the model takes it: frames chosen by `choose_frames`, sized by `resize_and_crop`.

    Args:
        source: the path of a video file, or frames as `uint8 (F, H, W, 3)`.
        num_frames, max_stride, start, generator: see `choose_frames`.
        height, width: the size wanted, in pixels.

    Returns:
        `float32 (num_frames, 3, height, width)` in [-1, 1].

    Raises:
        FileNotFoundError: if there is no such file.
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
    """Indices of one scene's frames among the available ones, with a warning if a further scene would fit beside it.

    Args:
        available: indices of the frames that the scene may take.
        name: of the video, for messages.
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


def _checked_indices(indices: Sequence[int], num_frames: int, name: str) -> list[int]:
    # NumPy and decord would count negative indices from the end, and a miscalculated index would go unseen.
    outside = [index for index in indices if not 0 <= index < num_frames]
    if outside:
        raise IndexError(f"{name} has frames 0 to {num_frames - 1}, but frame {outside[0]} was asked for")
    return list(indices)
