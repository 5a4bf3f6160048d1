"""Text on screen: subtitles found and text in the scene taken for subtitles, on drawn text over clips.

Each clip of a folder is measured as it is and with drawn text: subtitles of one and of two lines, small ones, and yellow
ones without an outline; a title that shows in the middle for a quarter of the time; a sign that moves with the scene, in the
middle or below; a logo in a corner. A cell holds the mean share of frames with subtitles, as the detector counts them, and
the mean share of the picture that text covers, with the share that the drawn text's bounds cover in parentheses. Clips of
fewer than 240 rows are left out, since drawn text is not legible in them.

    python benchmarks/text.py
    python benchmarks/text.py --clips MY/CLIPS
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mask2dit.curation.score import NUM_POSITIONS
from mask2dit.curation.text import TextDetector
from mask2dit.reporting.tables import markdown_table
from mask2dit.video.files import list_videos
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import open_video

ROOT = Path(__file__).parents[1]
MIN_HEIGHT = 240
LINES = ("We should have left before the rain.", "Nobody will find us here.", "Look at the river!", "Wait for me.")
Draw = Callable[[np.ndarray, int], tuple[np.ndarray, float]]


def write(frame: np.ndarray, lines: str, x: float, y: float, size: float, colour: str = "white", outline: bool = True):
    """A frame with text around (x, y), of a size relative to the height, and the share that the text's bounds cover."""
    image = Image.fromarray(frame)
    pen = ImageDraw.Draw(image)
    place, font = (x * image.width, y * image.height), ImageFont.load_default(size * image.height)
    stroke = max(1, round(size * image.height / 12)) if outline else 0
    pen.text(place, lines, colour, font, "mm", align="center", stroke_width=stroke, stroke_fill="black")
    left, top, right, bottom = pen.textbbox(place, lines, font, "mm", align="center", stroke_width=stroke)
    return np.asarray(image), (right - left) * (bottom - top) / (image.width * image.height)


KINDS: dict[str, Draw | None] = {
    "none": None,
    "one line": lambda frame, k: write(frame, LINES[k // 2 % 4], 0.5, 0.91, 0.055),
    "two lines": lambda frame, k: write(frame, f"{LINES[k // 2 % 4]}\n{LINES[(k // 2 + 1) % 4]}", 0.5, 0.88, 0.05),
    "small": lambda frame, k: write(frame, LINES[k // 2 % 4], 0.5, 0.94, 0.035),
    "yellow, no outline": lambda frame, k: write(frame, LINES[k // 2 % 4], 0.5, 0.91, 0.05, "#ffe94a", False),
    "title": lambda frame, k: write(frame, "THE RIVER", 0.5, 0.5, 0.14) if k in (3, 4) else (frame, 0.0),
    "sign": lambda frame, k: write(frame, "STATION", 0.15 + 0.09 * k, 0.45, 0.08, "#20304a", False),
    "sign below": lambda frame, k: write(frame, "STATION", 0.15 + 0.09 * k, 0.8 - 0.04 * k, 0.08, "#e8e0c8", False),
    "logo": lambda frame, k: write(frame, "CHANNEL 5", 0.88, 0.08, 0.04),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / "datasets/extension", help="folder of clips")
    options = parser.parse_args()
    detect = TextDetector()
    measured: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    seconds, num_frames = 0.0, 0
    for path in list_videos(options.clips):
        reader = open_video(path)
        if reader.height < MIN_HEIGHT:
            print(f"{path.name} is left out: it has {reader.height} rows\n")
            continue
        frames = reader.read(middle_frames(0, reader.num_frames, NUM_POSITIONS)).numpy()
        for kind, draw in KINDS.items():
            drawn = [draw(frame, k) if draw else (frame, 0.0) for k, frame in enumerate(frames)]
            started = time.process_time()
            text, subtitles = detect(np.stack([frame for frame, _ in drawn]))
            seconds, num_frames = seconds + time.process_time() - started, num_frames + len(frames)
            measured[kind].append((subtitles, text, max(area for _, area in drawn)))
    row = []
    for values in measured.values():
        subtitles, text, area = np.mean(values, axis=0)
        row.append(f"{subtitles:.2f}; {text:.3f} ({area:.3f})")
    print(f"{len(measured['none'])} clips; {num_frames / seconds:.1f} frames per CPU second\n")
    print(markdown_table(list(KINDS), [row]))


if __name__ == "__main__":
    main()
