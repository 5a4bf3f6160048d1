"""Scores of clips and the filters on them: motion, on-screen text and aesthetics."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mask2dit.curation.config import FilterConfig, ScoreConfig
from mask2dit.curation.store import Dropped, Entry
from mask2dit.curation.text import TextDetector
from mask2dit.curation.write import Clip
from mask2dit.device import choose_device
from mask2dit.encoders.frames import FrameEncoder, load_aesthetic_head
from mask2dit.hashing import fingerprint
from mask2dit.optional import import_optional
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import VideoReader

NUM_POSITIONS = 8  # sampled positions per clip
FLOW_WIDTH = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class Scores(Entry):
    """Scores of the clip with the same id; None where not measured."""

    short_side: int
    motion: float | None = None
    shake: float | None = None
    text: float | None = None
    subtitles: float | None = None
    aesthetic: float | None = None


def score_settings(config: ScoreConfig) -> dict:
    """The settings that scores depend on.

    Raises:
        FileNotFoundError: if weights are missing.
    """
    settings = {"num_positions": NUM_POSITIONS, "motion": config.motion}
    if config.text:
        settings["text"] = f"rapidocr {version('rapidocr')}"
    for name in ("clip", "aesthetic_head"):
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"score.{name}: there is nothing at {path!r}")
        settings[name] = path and fingerprint(path)
    return settings


Scorers = tuple["Aesthetic | None", "TextDetector | None"]


def load_scorers(config: ScoreConfig, device: str) -> Scorers:
    """The models that scores need, on the device of that name."""
    aesthetic = Aesthetic(config, choose_device(device)) if config.clip else None
    return aesthetic, TextDetector() if config.text else None


def score(clips: Iterable[Clip], scorers: Scorers, folder: Path, config: ScoreConfig) -> Iterator:
    """Measures clips."""
    aesthetic, text = scorers
    for clip in clips:
        reader = clip.open(folder)
        motion, shake = motion_and_shake(reader) if config.motion else (None, None)
        frames = None
        if aesthetic or text:
            frames = reader.read(middle_frames(0, reader.num_frames, NUM_POSITIONS))
        share, subtitles = text(frames.numpy()) if text else (None, None)
        scores = Scores(
            id=clip.id,
            source=clip.source,
            short_side=min(clip.width, clip.height),
            motion=motion,
            shake=shake,
            text=share,
            subtitles=subtitles,
            aesthetic=aesthetic and aesthetic(frames),
        )
        yield clip, [scores]


def apply_filters(scores: Iterable[Scores], config: FilterConfig) -> Iterator:
    """Drops clips that miss a limit, under the rule of the first one missed."""
    for entry in scores:
        limits = (
            ("low_resolution", "shorter side", entry.short_side, config.min_short_side, False),
            ("too_still", "motion", entry.motion, config.min_motion, False),
            ("too_shaky", "shake", entry.shake, config.max_shake, True),
            ("text", "text", entry.text, config.max_text, True),
            ("subtitles", "share of frames with subtitles", entry.subtitles, config.max_subtitles, True),
            ("low_aesthetic", "aesthetic score", entry.aesthetic, config.min_aesthetic, False),
        )
        result: Entry = entry
        for rule, name, value, limit, is_upper in limits:
            if limit is not None and (value > limit if is_upper else value < limit):
                why = f"{name} {value:.4g} is {'above' if is_upper else 'below'} {limit:g}"
                result = Dropped(id=entry.id, source=entry.source, rule=rule, why=why)
                break
        yield entry, [result]


def motion_and_shake(reader: VideoReader) -> tuple[float, float]:
    """Motion and camera shake of a clip, from the optical flow (Farnebäck) at sampled positions.

    Returns:
        The mean length of the flow, and the mean change between frames of its median vector, which is the camera's motion.
        Both are in percent of the width per second.

    Raises:
        ValueError: if OpenCV is not installed.
    """
    cv2 = import_optional("cv2", "curation")
    lengths, changes = [], []
    for first in middle_frames(0, reader.num_frames - 2, NUM_POSITIONS):
        frames = reader.read(range(first, first + 3)).numpy()
        size = (FLOW_WIDTH, max(16, round(FLOW_WIDTH * reader.height / reader.width)))
        grey = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for f in frames]
        flows = [
            cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # OpenCV's own example values
            for before, after in pairwise(grey)
        ]
        camera = [np.median(flow.reshape(-1, 2), axis=0) for flow in flows]
        lengths += [np.linalg.norm(flow, axis=-1).mean() for flow in flows]
        changes.append(np.linalg.norm(camera[1] - camera[0]))
    unit = 100 * reader.fps / FLOW_WIDTH
    return round(float(np.mean(lengths)) * unit, 3), round(float(np.mean(changes)) * unit, 3)


class Aesthetic:
    """LAION's aesthetic score as the evaluation computes it: the mean over frames."""

    def __init__(self, config: ScoreConfig, device: torch.device):
        self.encode = FrameEncoder(config.clip, device)
        self.head = load_aesthetic_head(config.aesthetic_head)

    @torch.inference_mode()
    def __call__(self, frames: torch.Tensor) -> float:
        return round(float(self.head(torch.from_numpy(self.encode(frames))).mean()), 3)
