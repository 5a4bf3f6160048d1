"""Draws a generated video as a GIF with its scenes side by side: python scripts/draw_story_gif.py VIDEO.mp4 OUT.gif

The video's record (VIDEO.json) says where its scenes begin. Frames are enlarged by nearest neighbour, prompts are below.
"""

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mask2dit.video.reading import open_video

WIDTH = 256  # of a scene, at least
GAP, LINES, LINE_HEIGHT = 8, 3, 18


def draw(video: Path, output: Path) -> None:
    reader = open_video(video)
    scenes = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))["scenes"]
    frames = [reader.read(range(*scene["frames"])).numpy() for scene in scenes]
    factor = -(-WIDTH // reader.width)
    width, height = reader.width * factor, reader.height * factor
    font = ImageFont.load_default(14)

    page = Image.new("RGB", (len(scenes) * (width + GAP) - GAP, height + GAP + LINES * LINE_HEIGHT), "white")
    text = ImageDraw.Draw(page)
    for i, scene in enumerate(scenes):
        lines = textwrap.wrap(f"{i + 1}. {scene['prompt']}", width // 7, max_lines=LINES, placeholder=" …")
        for n, line in enumerate(lines):
            text.text((i * (width + GAP), height + GAP + n * LINE_HEIGHT), line, "black", font)
    images = []
    for k in range(max(map(len, frames))):
        image = page.copy()
        for i, of_scene in enumerate(frames):
            frame = Image.fromarray(of_scene[min(k, len(of_scene) - 1)])
            image.paste(frame.resize((width, height), Image.Resampling.NEAREST), (i * (width + GAP), 0))
        images.append(image)
    images[0].save(output, save_all=True, append_images=images[1:], duration=round(1000 / reader.fps), loop=0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
