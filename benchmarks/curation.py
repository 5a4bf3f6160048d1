"""How many films a minute are split and embedded, and whether memory grows with their number.

Each stage runs in a fresh process over few and over many copies of a drawn film, and once more when nothing is left to do,
which tells how long it takes to start. Printed are the rate over the many without that, and the peaks of memory.

    python benchmarks/curation.py
    python benchmarks/curation.py --films 16 64 --height 720 --width 1080 --viclip models/ViCLIP/ViClip-InternVid-10M-FLT.pth

Without --viclip, a tiny one with random weights is built, which costs next to nothing beside reading the clips.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mask2dit.encoders.untrained import build_untrained_viclip
from mask2dit.reporting.tables import markdown_table
from mask2dit.video.writing import write_video

ROOT = Path(__file__).parents[1]
STAGES = ("split", "write", "embed")
FPS = 24


def film(scenes: int, seconds: float, height: int, width: int) -> Iterator[np.ndarray]:
    """Squares that move over a background of another colour in each scene."""
    random = np.random.default_rng(0)
    for number in range(scenes):
        background = random.integers(0, 100, 3) + 120 * (number % 2)
        side = height // 4
        for k in range(int(seconds * FPS)):
            frame = np.full((height, width, 3), background, np.uint8)
            left = 3 * k % (width - side)
            frame[side : 2 * side, left : left + side] = 255 - background
            yield frame


def run(stage: str, films: Path, output: Path, viclip: Path) -> tuple[float, float]:
    """Runs stages on what the ones before have done. Returns seconds and the peak of memory in MiB."""
    arguments = [f"films={films}", f"output={output}", f"stages=[{stage}]", f"embed.viclip.weights={viclip}"]
    arguments += ["filter.min_short_side=null", "device=auto"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mask2dit.curation", "configs/curation/films.yaml", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"stage {stage} failed:\n{errors}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, nargs=2, default=[8, 32], metavar=("FEW", "MANY"))
    parser.add_argument("--scenes", type=int, default=5, help="of a film")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a scene")
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=540)
    parser.add_argument("--viclip", type=Path, help="ViCLIP's weights; a tiny untrained one if not given")
    options = parser.parse_args()
    few, many = options.films
    if not 0 < few < many:
        parser.error(f"--films {few} {many}: the first has to be less than the second")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        viclip = (
            options.viclip.absolute() if options.viclip else build_untrained_viclip(folder / "untrained.safetensors")
        )
        write_video(folder / "film.mp4", film(options.scenes, options.seconds, options.height, options.width), FPS)
        measured, idle = {}, {}
        for count in options.films:
            films, output = folder / f"films-{count}", folder / f"output-{count}"
            films.mkdir()
            for number in range(count):
                shutil.copyfile(folder / "film.mp4", films / f"{number}.mp4")
            run("probe", films, output, viclip)
            for stage in STAGES:
                # Stages between them do next to nothing with these settings.
                if stage == "embed":
                    run("score,filter", films, output, viclip)
                measured[stage, count] = run(stage, films, output, viclip)
                idle[stage] = run(stage, films, output, viclip)[0]

    seconds = options.scenes * options.seconds
    print(f"films of {seconds:g} s, {options.width}x{options.height}, {options.scenes} scenes\n")
    heads = [
        "stage",
        "films per minute",
        "times real time",
        f"peak MiB, {few} films",
        f"peak MiB, {many} films",
        "growth",
    ]
    rows = []
    for stage in STAGES:
        (_, memory_few), (time_many, memory_many) = measured[stage, few], measured[stage, many]
        rate = many / (time_many - idle[stage])
        memory = [f"{memory_few:.0f}", f"{memory_many:.0f}", f"{memory_many / memory_few:.2f}x"]
        rows.append([stage, f"{60 * rate:.0f}", f"{rate * seconds:.1f}", *memory])
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
