"""Clips: choosing and reading the frames of a training scene."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mask2dit.data.config import DataConfig
from mask2dit.randomness import generator_for
from mask2dit.video.frames import choose_frames, resize_and_crop
from mask2dit.video.reading import RangeReader, VideoReader, open_video

# Pre-training drops the start and the end of a clip, where collected clips often still show the neighbouring scenes.
DROPPED_PERCENT = 5
# Delay between read attempts, so that transient storage errors can clear.
RETRY_SECONDS = 0.5


class UnreadableClipError(ValueError):
    """No scene can be taken from a clip. The message names the file and the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)  # small, since there may be millions in every process
class Clip:
    """One clip of a manifest: a video file or a part of one, its caption, and its properties as listed there (None: not
    listed)."""

    root: Path
    file: str
    """Path in the manifest, relative to `root`."""
    caption: str
    row: int
    scene: int | None = None
    start: int | None = None
    end: int | None = None
    """The clip shows frames start … end - 1 of the file; None: from the first frame, to the last."""
    crop: tuple[int, int, int, int] | None = None
    """Top, left, height and width of the part of the picture in pixels; None: all of it."""
    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None

    @property
    def path(self) -> Path:
        return self.root / self.file

    @property
    def name(self) -> str:
        """Identifies the clip independently of the folder's location: the file, with the frame range and the part of the
        picture if there are any, such as "film.mp4#120-310"."""
        if self.start is None and self.end is None and self.crop is None:
            return self.file
        frames = f"{self.start or 0}-{'' if self.end is None else self.end}"
        return f"{self.file}#{frames}" + ("" if self.crop is None else "@" + ",".join(map(str, self.crop)))

    @property
    def frames(self) -> tuple[str, int, int | None]:
        """The real path of the file and the frame range, which tell clips that show the same from others."""
        return os.path.realpath(self.path), self.start or 0, self.end

    @property
    def label(self) -> str:
        """Row and scene of the clip in the manifest, counted from 1."""
        return f"row {self.row}" if self.scene is None else f"row {self.row} scene {self.scene}"


def required_frames(config: DataConfig) -> int:
    """The minimum number of frames of a clip from which a scene can be taken."""
    if config.kind == "finetune":
        return config.num_frames
    # Rounded up: the kept frames, rounded down, have to hold num_frames steps of the stride.
    return -(-config.num_frames * config.max_stride * 100 // (100 - 2 * DROPPED_PERCENT))


def is_long_enough(clip: Clip, config: DataConfig) -> bool:
    """True if the clip has enough frames according to the manifest, or its length is not listed."""
    return clip.num_frames is None or clip.num_frames >= required_frames(config)


def scene_windows(row: list[Clip], config: DataConfig) -> list[list[Clip]]:
    """Every `num_scenes` consecutive scenes of a row that are all long enough according to the manifest."""
    starts = range(len(row) - config.num_scenes + 1)
    windows = [row[start : start + config.num_scenes] for start in starts]
    return [window for window in windows if all(is_long_enough(clip, config) for clip in window)]


def window_variant(config: DataConfig, epoch: int) -> int:
    """The index of the frame range that an epoch takes from each clip."""
    return epoch if config.num_windows is None else epoch % config.num_windows


def choose_window(config: DataConfig, name: str, total_frames: int, variant: int) -> list[int]:
    """The frames that a scene takes from a clip: a function of the seed, the clip and the variant alone.

    Pre-training drops the first and the last 5% of the clip and takes `num_frames` at the stride `max_stride`, from a random
    start. Fine-tuning takes them at the largest stride from `max_stride` down to 1 that fits, from a random start. The
    published training does the same.

    Args:
        config: the configuration of the clips.
        name: name of the clip.
        total_frames: frames in the clip.
        variant: see `window_variant`.

    Returns:
        `num_frames` indices.

    Raises:
        ValueError: if the clip is too short.
    """
    if total_frames < required_frames(config):
        raise ValueError(f"it has {total_frames} frames, but {describe_required_frames(config)}")
    generator = generator_for(config.seed, "window", name, variant)
    if config.kind == "finetune":
        return choose_frames(total_frames, config.num_frames, config.max_stride, "random", generator)
    first, stop = _kept_range(total_frames)
    span = (config.num_frames - 1) * config.max_stride + 1
    first += int(torch.randint(stop - first - span + 1, (1,), generator=generator))
    return list(range(first, first + span, config.max_stride))


def frames_to_read(config: DataConfig, name: str, total_frames: int) -> Sequence[int]:
    """Every frame of a clip that training may read: those of its `num_windows` frame ranges, or of all possible ones.

    Args:
        config: the configuration of the clips.
        name: name of the clip.
        total_frames: frames in the clip, which is long enough.
    """
    if config.num_windows is not None:
        windows = (choose_window(config, name, total_frames, variant) for variant in range(config.num_windows))
        return sorted(set().union(*windows))
    return range(total_frames) if config.kind == "finetune" else range(*_kept_range(total_frames))


def _kept_range(total_frames: int) -> tuple[int, int]:
    """The first frame of a clip that pre-training may take, and the one after the last."""
    return total_frames * DROPPED_PERCENT // 100, total_frames * (100 - DROPPED_PERCENT) // 100


def describe_required_frames(config: DataConfig) -> str:
    """`required_frames` and its reason, as the end of a sentence."""
    if config.kind == "finetune":
        return f"{config.num_frames} are needed even at stride 1"
    return (
        f"{required_frames(config)} are needed for {config.num_frames} at stride {config.max_stride} after the first and "
        f"last {DROPPED_PERCENT}% are dropped"
    )


def read_clip(config: DataConfig, clip: Clip, variant: int) -> torch.Tensor:
    """One scene as input of the VAE, `float32 (num_frames, 3, height, width)` in [-1, 1].

    A clip that cannot be read is tried again up to `config.max_retries` times.

    Raises:
        UnreadableClipError: if the file does not exist, cannot be read or decoded, or is too short.
    """
    for tries_left in range(config.max_retries, -1, -1):
        try:
            return _read_once(config, clip, variant)
        except (OSError, ValueError) as error:
            if not tries_left:
                raise UnreadableClipError(str(error)) from error
            time.sleep(RETRY_SECONDS)


def open_clip(clip: Clip) -> VideoReader:
    """A reader of the clip's frames.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be read, or does not hold the clip's frame range.
    """
    reader = open_video(clip.path)
    if clip.name == clip.file:
        return reader
    try:
        return RangeReader(reader, clip.start, clip.end, clip.crop)
    except ValueError as error:
        raise ValueError(f"video {clip.path}: {error}") from error


def _read_once(config: DataConfig, clip: Clip, variant: int) -> torch.Tensor:
    reader = open_clip(clip)
    try:
        indices = choose_window(config, clip.name, reader.num_frames, variant)
    except ValueError as error:
        raise ValueError(f"video {clip.path} is too short: {error}") from error
    return resize_and_crop(reader.read(indices), config.height, config.width)
