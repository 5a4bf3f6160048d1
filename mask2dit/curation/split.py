"""Splitting films into scenes at cuts, found by PySceneDetect or by your own function."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from mask2dit.curation.config import SplitConfig
from mask2dit.curation.optional import import_optional
from mask2dit.curation.probe import Film
from mask2dit.curation.store import Dropped, Entry
from mask2dit.video.cuts import detect_cuts, run_detector
from mask2dit.video.reading import FileReader, VideoReader

DETECTION_WIDTH = 256  # pixels; cuts also show in small pictures, in a fraction of the time


@dataclass(frozen=True, kw_only=True)
class Scene(Entry):
    """Frames start … stop - 1 of a film."""

    start: int
    stop: int


Detector = Callable[[VideoReader], list[int]]


def split(films: Iterable[Film], folder: Path, config: SplitConfig, min_frames: int) -> Iterator:
    """Cuts films into scenes and drops those of fewer than `min_frames` frames.

    Raises:
        ValueError: if a detector cannot be loaded, or returns a cut outside the film.
    """
    detectors = [load_detector(name, config) for name in config.detectors]
    for film in films:
        try:
            reader = FileReader(folder / film.id)  # its warnings were printed after probing
            small = _Small(reader)
            cuts = sorted({cut for detect in detectors for cut in detect(small)})
        except ValueError as error:
            yield film, [Dropped(id=film.id, source=film.source, rule="unreadable", why=str(error))]
            continue
        if outside := [cut for cut in cuts if not 0 < cut < reader.num_frames]:
            raise ValueError(
                f"a detector of {', '.join(config.detectors)} cuts {film.id} at frame {outside[0]}, but scenes can begin at "
                f"frames 1 to {reader.num_frames - 1} only"
            )
        yield film, [_scene(film, start, stop, min_frames) for start, stop in scenes(cuts, reader, config)]


def scenes(cuts: Sequence[int], reader: VideoReader, config: SplitConfig) -> list[tuple[int, int]]:
    """The scenes [start, stop) between cuts, with long scenes cut into parts.

    As in Panda-70M (arXiv 2402.19479), parts of `force_cut_length` seconds are cut from the beginning of a scene for as long
    as the rest exceeds `force_cut_above` seconds.
    """
    bounds = [0, *cuts, reader.num_frames]
    found = []
    for start, stop in pairwise(bounds):
        if config.force_cut_above is not None:
            limit, part = (
                round(seconds * reader.fps) for seconds in (config.force_cut_above, config.force_cut_length)
            )
            while stop - start > limit:
                found.append((start, start + part))
                start += part
        found.append((start, stop))
    return found


def load_detector(name: str, config: SplitConfig) -> Detector:
    """A detector by its name in the configuration. Each call of it creates a new PySceneDetect detector, which keeps state.

    Raises:
        ValueError: if `module:function` cannot be found, or PySceneDetect is not installed.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"the detector {name!r} cannot be loaded: {error}") from error
    detectors = import_optional("scenedetect.detectors")
    if name == "content":
        return lambda reader: detect_cuts(reader, config.content_threshold, min_scene_frames=0)
    if name == "adaptive":
        return lambda reader: run_detector(
            detectors.AdaptiveDetector(config.adaptive_threshold, min_scene_len=0), reader
        )
    return lambda reader: run_detector(detectors.ThresholdDetector(config.fade_threshold, min_scene_len=0), reader)


class _Small:
    """A `VideoReader` that subsamples the rows and columns of another."""

    def __init__(self, reader: VideoReader):
        self._reader = reader
        self._step = max(1, reader.width // DETECTION_WIDTH)
        self.num_frames, self.fps = reader.num_frames, reader.fps
        self.height, self.width = (-(-side // self._step) for side in (reader.height, reader.width))

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return self._reader.read(indices)[:, :: self._step, :: self._step]


def _scene(film: Film, start: int, stop: int, min_frames: int) -> Scene | Dropped:
    name = f"{film.id}#{start}-{stop}"
    if stop - start < min_frames:
        why = f"{stop - start} frames, but {min_frames} are needed"
        return Dropped(id=name, source=film.source, rule="too_short", why=why)
    return Scene(id=name, source=film.source, start=start, stop=stop)
