"""Draws short films to try the curation on: `python scripts/draw_example_films.py [FOLDER]`.

The result is two films of several scenes each, one of them with black bars, and a file that is not a video. The films show a
robot from near or far on a plain, at a lake or in a town. `FILMS` defines where they are cut.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mask2dit.video.writing import write_video

WIDTH, HEIGHT, FPS = 192, 128, 12
BAR = 16  # black rows above and below, in films with bars
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Scene:
    place: str
    colour: str
    """Colour of the robot's scarf."""
    frames: int
    zoom: float = 1.0
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of red, green and blue."""


MORNING, EVENING, NIGHT = (0.95, 1.0, 1.05), (0.95, 0.6, 0.35), (0.3, 0.35, 0.6)
FILMS = {
    "red_scarf.mp4": [
        Scene("plain", "#d62b3a", 60, light=MORNING),
        Scene("plain", "#d62b3a", 66, zoom=1.5, light=EVENING),
        Scene("plain", "#d62b3a", 58, zoom=0.7, light=NIGHT),
        Scene("town", "#d62b3a", 9, light=EVENING),
        Scene("town", "#d62b3a", 64, light=MORNING),
    ],
    "bars/blue_scarf.mp4": [
        Scene("lake", "#2a6fd6", 62, light=MORNING),
        Scene("lake", "#2a6fd6", 60, zoom=1.4, light=NIGHT),
        Scene("lake", "#2a6fd6", 64, zoom=0.8, light=EVENING),
        Scene("town", "#2a6fd6", 58, zoom=1.3, light=MORNING),
    ],
}
"""Scenes of each film in order. Films in `bars` have black bars."""

PLACES = {  # colours of the sky, the ground and the objects
    "plain": ((150, 205, 245), (110, 170, 80), "#6f9f4e"),
    "lake": ((250, 170, 110), (90, 120, 190), "#7d6a86"),
    "town": ((235, 235, 240), (120, 120, 125), "#a9794f"),
}


def draw(scene: Scene, t: float) -> np.ndarray:
    """The picture at time t, 0 to 1."""
    sky, ground, colour = PLACES[scene.place]
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), sky)  # drawn larger and scaled down, which smooths the edges
    pen = ImageDraw.Draw(image)
    horizon = 2 * HEIGHT * (0.62 + 0.06 * (scene.zoom - 1))
    for k in range(6):
        x, size = (k * 90 - 60 * t - 20) * scene.zoom, (40 + 13 * (k % 3)) * scene.zoom
        if scene.place == "town":
            pen.rectangle([x, horizon - 1.6 * size, x + size, horizon], fill=colour)
        else:
            pen.ellipse([x, horizon - size, x + 2.6 * size, horizon + size], fill=colour)
    pen.rectangle([0, horizon, 2 * WIDTH, 2 * HEIGHT], fill=ground)
    x, y, r = 2 * WIDTH * (0.25 + 0.45 * t), horizon + 30, 30 * scene.zoom
    pen.ellipse([x - r / 2, y, x + r / 2, y + r], fill="#3b4252")
    angle = 8 * t
    pen.line([x, y + r / 2, x + r / 2 * math.cos(angle), y + r / 2 + r / 2 * math.sin(angle)], fill="#e8f4ff", width=3)
    pen.ellipse([x - r, y - 2 * r, x + r, y], fill="#aeb8c8")
    pen.rectangle([x - 0.9 * r, y - 0.6 * r, x + 0.9 * r, y - 0.15 * r], fill=scene.colour)
    pen.ellipse([x + 0.2 * r, y - 1.6 * r, x + 0.6 * r, y - 1.2 * r], fill="#16202e")
    picture = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    return (picture * scene.light).clip(0, 255).astype(np.uint8)


def frames(name: str) -> Iterator[np.ndarray]:
    """The frames of a film."""
    for scene in FILMS[name]:
        for k in range(scene.frames):
            picture = draw(scene, k / (scene.frames - 1))
            yield np.pad(picture, ((BAR, BAR), (0, 0), (0, 0))) if name.startswith("bars") else picture


def main(folder: Path) -> None:
    for name in FILMS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, frames(name), FPS)
    (folder / "broken.mp4").write_bytes(b"This is no video.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/example-films")
