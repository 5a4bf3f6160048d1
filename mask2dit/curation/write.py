"""Clips of scenes, with ends trimmed and borders removed: files of their own, or frame ranges of the films."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mask2dit.curation.config import WriteConfig
from mask2dit.curation.split import Scene
from mask2dit.curation.store import Dropped, Entry
from mask2dit.hashing import digest
from mask2dit.video.reading import FileReader, RangeReader, VideoReader, open_video
from mask2dit.video.writing import write_video

FRAMES_AT_ONCE = 16
BORDER_SAMPLES = 24  # frames of a film in which borders are searched
BORDER_SHARE = 0.99  # of a row's pixels that must have the border's colour: compression changes a few
MAX_BORDERS = 0.75  # of a side; a picture with larger borders is dark or plain rather than bordered
TOLERANCE = 12  # largest difference of such a pixel from that colour, of 255
DARK = 32  # largest value of a nearly black border, of 255


@dataclass(frozen=True, kw_only=True)
class Clip(Entry):
    """A scene without the frames and borders that are left out."""

    file: str
    """Path of the scene's video file in the folder of films."""
    path: str
    """Relative to the output folder: the clip's own file, or the scene's video file if `is_range`."""
    is_range: bool = False
    """True if the clip is the frame range and the part of the picture in `path` that the next fields tell."""
    start: int
    stop: int
    """The clip shows frames start … stop - 1 of the scene's video file."""
    crop: list[int]
    """Top, left, height and width in the film's picture."""
    num_frames: int
    fps: float
    width: int
    height: int
    transition: int = 0
    """As in the scene."""

    def open(self, folder: Path) -> VideoReader:
        """A reader of the clip.

        Args:
            folder: the output folder.
        """
        reader = open_video(folder / self.path)
        return RangeReader(reader, self.start, self.stop, self.crop) if self.is_range else reader


def write(scenes: Iterable[Scene], films: Path, folder: Path, config: WriteConfig, settings: dict) -> Iterator:
    """Makes one clip per scene: a file below `folder` / clips, or a frame range if `config.encode` is off. Drops scenes that
    cannot be decoded; all frames of a scene are decoded either way, so that later stages can read every clip.

    Raises:
        OSError: if a file cannot be written.
    """
    file, reader, crop = None, None, None
    for scene in scenes:
        start, stop = scene.start + config.trim_frames, scene.stop - config.trim_frames
        # The name depends on the settings, so that clips of other settings are not overwritten.
        name = f"{start}-{stop}-{digest([scene.key, settings])[:8]}.mp4"
        path = folder / "clips" / Path(scene.file).with_suffix("") / name
        try:
            if scene.file != file:
                reader = FileReader(films / scene.file)
                crop = film_crop(reader, config)
                file = scene.file
            frames = cropped_frames(reader, start, stop, crop, config.max_short_side)
            clip: VideoReader
            if config.encode:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, frames, reader.fps)
                clip = open_video(path)
                relative = path.relative_to(folder).as_posix()
            else:
                clip = RangeReader(reader, start, stop, crop)
                deque(frames, maxlen=0)  # decodes them; shots, which no detector has read, may be damaged
                relative = os.path.relpath(films.absolute() / scene.file, folder.resolve())
        except ValueError as error:
            yield scene, [Dropped(id=scene.id, source=scene.source, rule="unreadable", why=str(error))]
            continue
        made = Clip(
            id=scene.id,
            source=scene.source,
            file=scene.file,
            path=relative,
            is_range=not config.encode,
            start=start,
            stop=stop,
            crop=list(crop),
            num_frames=clip.num_frames,
            fps=clip.fps,
            width=clip.width,
            height=clip.height,
            transition=scene.transition,
        )
        yield scene, [made]


def film_crop(reader: VideoReader, config: WriteConfig) -> tuple[int, int, int, int]:
    """The part of a film's picture that clips show: top, left, height, width, with even sizes.

    Borders are searched in the whole film: within one scene, a plain sky would pass for a border.
    """
    height, width = reader.height, reader.width
    top = bottom = left = right = 0
    if config.remove_borders:
        indices = np.linspace(0, reader.num_frames - 1, min(BORDER_SAMPLES, reader.num_frames)).round().astype(int)
        top, bottom, left, right = find_borders(reader.read(indices.tolist()).numpy())
    height, width = height - top - bottom, width - left - right
    return top, left, height - height % 2, width - width % 2


def find_borders(frames: np.ndarray) -> tuple[int, int, int, int]:
    """Rows at the top and bottom and columns at the left and right that never change and have one colour.

    A border counts if it is nearly black, or if the opposite border has the same colour. A picture of which little would be
    left has no borders.

    Args:
        frames: `uint8 (F, H, W, 3)`.

    Returns:
        Numbers of rows or columns: top, bottom, left, right.
    """
    top, bottom = _opposite_borders(frames)
    # Columns are searched within the remaining rows, without the bars above and below.
    left, right = _opposite_borders(np.swapaxes(frames[:, top : frames.shape[1] - bottom], 1, 2))
    return top, bottom, left, right


def _opposite_borders(frames: np.ndarray) -> tuple[int, int]:
    first, first_colour = _border(frames)
    last, last_colour = _border(frames[:, ::-1])
    if first + last > MAX_BORDERS * frames.shape[1]:
        return 0, 0
    alike = first and last and np.abs(first_colour - last_colour).max() <= TOLERANCE
    return tuple(
        size if alike or colour.max() <= DARK else 0 for size, colour in ((first, first_colour), (last, last_colour))
    )


def _border(frames: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of leading rows that have the first row's colour in all frames, and that colour."""
    colour = np.median(frames[:, 0].reshape(-1, 3), axis=0)
    for row in range(frames.shape[1]):
        differs = np.abs(frames[:, row].astype(np.int16) - colour).max(axis=-1) > TOLERANCE
        if differs.mean() > 1 - BORDER_SHARE:
            return row, colour
    return frames.shape[1], colour


def cropped_frames(
    reader: VideoReader, start: int, stop: int, crop: tuple[int, int, int, int], max_short_side: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the frames of a clip, `uint8 (H, W, 3)`, with a few in memory at a time."""
    top, left, height, width = crop
    scale = 1.0 if max_short_side is None else min(1.0, max_short_side / min(height, width))
    size = tuple(2 * max(1, round(side * scale / 2)) for side in (width, height))
    for first in range(start, stop, FRAMES_AT_ONCE):
        frames: torch.Tensor = reader.read(range(first, min(first + FRAMES_AT_ONCE, stop)))
        for frame in frames[:, top : top + height, left : left + width].numpy():
            yield frame if scale == 1 else np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
