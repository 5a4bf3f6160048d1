"""Events of a running generation, for those who watch it: a progress display, or the studio.

An observer is a function that is called with each event, in the thread that generates. It stops the generation by raising
`Cancelled`. Scenes are counted from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class SceneStarted:
    """The denoising of a scene starts. The scenes of a window start together."""

    scene: int


@dataclass(frozen=True)
class StepFinished:
    """A denoising step of a window's new scenes is done."""

    scenes: tuple[int, ...]
    step: int
    """Number of steps done, from 1 to `num_steps`."""
    num_steps: int


@dataclass(frozen=True)
class PreviewMade:
    """A scene as the current step predicts it."""

    scene: int
    step: int
    """Number of steps done."""
    image: np.ndarray
    """The frame in the middle, uint8 (H, W, 3)."""


@dataclass(frozen=True)
class SceneFinished:
    """The video file of a scene is complete."""

    scene: int
    path: Path
    source: str
    """"generated", "given" (read from a video file) or "kept" (taken from an earlier run)."""


Event = SceneStarted | StepFinished | PreviewMade | SceneFinished
Observer = Callable[[Event], None]


class Cancelled(Exception):
    """Raised by an observer to stop the generation. Finished scenes stay in the store."""


def ignore(event: Event) -> None:
    """Observes nothing."""
