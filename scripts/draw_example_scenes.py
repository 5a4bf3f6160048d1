"""Draws the scenes that the extension examples continue: `python scripts/draw_example_scenes.py [FOLDER]`."""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mask2dit.storyworld.render import render_story
from mask2dit.storyworld.trial import FPS as STORYWORLD_FPS
from mask2dit.storyworld.world import Actor, Identity, Scene, Story
from mask2dit.video.writing import write_video

WIDTH, HEIGHT, FPS, FRAMES = 720, 480, 24, 72
ROOT = Path(__file__).parents[1]
SCALE = 2  # scenes are drawn larger and scaled down, which smooths the edges

# A story of the small world with the captions in configs/inference/extension_small.yaml.
SMALL_STORY = Story(
    actors=(Actor(shape="square", colour="green", accessory="scarf"),),
    setting="beach",
    scenes=(
        Scene(present=(0,), actions=("moves right",), starts=(0.3,), camera=0.1),
        Scene(present=(0,), actions=("jumps",), starts=(0.6,), camera=0.5),
    ),
    identities=(
        Identity(
            hues=(-8.0,),
            sizes=(0.1,),
            horizon=0.58,
            sky_warmth=0.03,
            sky_brightness=0.01,
            ground_warmth=-0.03,
            ground_brightness=0.0,
            stripe_angle=25.0,
            stripe_wavelength=0.1,
        ),
    )
    * 2,
)


def sky(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    """A vertical gradient."""
    weight = np.linspace(0, 1, HEIGHT * SCALE)[:, None, None]
    pixels = np.array(top) * (1 - weight) + np.array(bottom) * weight
    return Image.fromarray(np.broadcast_to(pixels, (HEIGHT * SCALE, WIDTH * SCALE, 3)).astype(np.uint8))


def hills(draw: ImageDraw.ImageDraw, base: float, swing: float, shift: float, colour: str) -> None:
    """A wavy ridge from edge to edge, filled to the bottom."""
    ridge = [
        (x * SCALE, (base + swing * math.sin((x + shift) / 110) + swing / 2 * math.sin((x + shift) / 47)) * SCALE)
        for x in range(0, WIDTH + 8, 8)
    ]
    draw.polygon([*ridge, (WIDTH * SCALE, HEIGHT * SCALE), (0, HEIGHT * SCALE)], fill=colour)


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: str) -> None:
    draw.ellipse([(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE], fill=colour)


def robot(draw: ImageDraw.ImageDraw, x: float, y: float, turn: float, wind: float) -> None:
    """The actor: a round grey robot on one wheel, wearing a red scarf. Its wheel touches the ground at (x, y)."""
    disc(draw, x, y - 22, 22, "#3b4252")
    for spoke in range(3):
        angle = turn + spoke * math.pi / 3
        dx, dy = 18 * math.cos(angle), 18 * math.sin(angle)
        line = [(x - dx) * SCALE, (y - 22 - dy) * SCALE, (x + dx) * SCALE, (y - 22 + dy) * SCALE]
        draw.line(line, fill="#8892a6", width=4 * SCALE)
    disc(draw, x, y - 84, 48, "#aeb8c8")
    tail = [(x - 30, y - 52), (x - 88, y - 62 + wind), (x - 84, y - 40 + wind), (x - 30, y - 36)]
    draw.polygon([(a * SCALE, b * SCALE) for a, b in tail], fill="#b3202c")
    box = [(x - 42) * SCALE, (y - 60) * SCALE, (x + 42) * SCALE, (y - 34) * SCALE]
    draw.rounded_rectangle(box, radius=12 * SCALE, fill="#d62b3a")
    disc(draw, x + 18, y - 96, 14, "#16202e")
    disc(draw, x + 22, y - 100, 5, "#e8f4ff")


def across_the_hills(t: float) -> Image.Image:
    """Scene 1: the robot rolls across green hills on a sunny morning."""
    image = sky((120, 190, 240), (225, 240, 250))
    draw = ImageDraw.Draw(image)
    disc(draw, 590, 95, 42, "#ffe38a")
    for x, y in ((120, 90), (330, 140)):
        for dx, radius in ((-30, 22), (0, 32), (34, 24)):
            disc(draw, x + dx + 30 * t, y, radius, "#ffffff")
    hills(draw, 300, 26, 60 * t, "#a5cf7e")
    hills(draw, 350, 18, 400 + 120 * t, "#7cb55a")
    hills(draw, 415, 6, 900 + 260 * t, "#5a9a44")
    robot(draw, 130 + 420 * t, 420 + 4 * math.sin(9 * t), 12 * t, 8 * math.sin(20 * t))
    return image


def at_the_lake(t: float) -> Image.Image:
    """Scene 2: the robot arrives at a lake at sunset and stops beside a white boat."""
    image = sky((250, 150, 90), (255, 220, 170))
    draw = ImageDraw.Draw(image)
    disc(draw, 480, 235 + 20 * t, 46, "#fff0b8")
    hills(draw, 250, 22, 700, "#7d6a86")
    draw.rectangle([0, 290 * SCALE, WIDTH * SCALE, HEIGHT * SCALE], fill="#d98a63")
    for row in range(12):
        y = 296 + row * 9
        x = 480 + 14 * math.sin(8 * t + row * 1.7)
        half = (52 - 2 * row) * SCALE
        draw.line([x * SCALE - half, y * SCALE, x * SCALE + half, y * SCALE], fill="#ffe3a6", width=3 * SCALE)
    y = 372 + 3 * math.sin(9 * t)
    hull = [(560, y), (690, y), (665, y + 32), (585, y + 32)]
    draw.polygon([(a * SCALE, b * SCALE) for a, b in hull], fill="#f7f3ec")
    draw.line([620 * SCALE, y * SCALE, 620 * SCALE, (y - 84) * SCALE], fill="#6b4a32", width=5 * SCALE)
    hills(draw, 425, 5, 300, "#6f7d4a")
    eased = 1 - (1 - min(1, 1.25 * t)) ** 3
    robot(draw, 40 + 330 * eased, 436, 10 * eased, 4 * math.sin(12 * t))
    return image


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate((across_the_hills, at_the_lake), start=1):
        frames = (scene(i / (FRAMES - 1)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS) for i in range(FRAMES))
        write_video(folder / f"scene_{number}.mp4", map(np.asarray, frames), FPS)
    for number, frames in enumerate(render_story(SMALL_STORY), 1):
        write_video(folder / f"small_{number}.mp4", frames, STORYWORLD_FPS, full_chroma=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "datasets/extension")
