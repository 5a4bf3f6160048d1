"""Training on videos that are read and encoded as they come, against latents and text embeddings computed ahead, and those
with another attention backend, with compiled blocks, and with both.

All ways train the same model on the same samples, in fresh processes that take turns. Printed are the medians over runs
of the time of a step, the share of it spent waiting for the data loader, and the peak of memory (on a GPU, what torch
allocated there; without one, of the process), and their ratios. The first steps of a run are left out.

    python benchmarks/training.py
    python benchmarks/training.py --model models/CogVideoX-2b --height 480 --width 720 --frames 49 --precision bf16
    python benchmarks/training.py --model models/storyworld --height 64 --width 64 --frames 9 --batch-size 4

Without --model, a small untrained model is built. The clips are made here: moving squares.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mask2dit.pipelines.untrained import build_untrained_model
from mask2dit.video.writing import write_video

ROOT = Path(__file__).parents[1]
STRIDE = 3  # of the frames taken from a clip, as in the published recipe
WARM_UP = 3  # steps
GIB = 2**30


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> Path:
    """Clips of a moving square, long enough for `frames` at the stride, and their manifest, whose path is returned."""
    random = np.random.default_rng(0)
    length = int((frames - 1) * STRIDE / 0.9) + 4  # pre-training leaves out 5% at each end
    side = height // 3
    manifest = folder / "pretrain.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["fps", "width", "height", "caption", "path", "num_frame"])
        for clip in range(count):
            video = np.empty((length, height, width, 3), np.uint8)
            video[:] = colour = random.integers(0, 255, 3)
            for t in range(length):
                left = 2 * t % (width - side)
                video[t, side : 2 * side, left : left + side] = 255 - colour
            write_video(folder / f"{clip}.mp4", video, fps=24)
            rows.writerow([24, width, height, f"A square moves in clip {clip}.", f"{clip}.mp4", length])
    return manifest


def run(module: str, arguments: list[str]) -> float:
    """Runs a module of the package. Returns its peak memory in GiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{errors}")
    return usage.ru_maxrss * 1024 / GIB


def measure(output_dir: Path, arguments: list[str]) -> dict[str, float]:
    """One training run: the medians over its steps, and its peak memory."""
    peak = run("mask2dit.training", ["configs/train/pretrain.yaml", *arguments, f"output_dir={output_dir}"])
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    median = {name: statistics.median(line[name] for line in lines) for name in ("seconds", "data_wait")}
    return {**median, "peak_gib": lines[-1].get("peak_memory_gib", peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in diffusers' layout; a small untrained one if not given")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--frames", type=int, default=17, help="of a scene")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that read videos or the cache")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--attention-backend", default="_native_math", help="that is compared with torch's own choice")
    parser.add_argument("--steps", type=int, default=15, help="of a run")
    parser.add_argument("--runs", type=int, default=3, help="of each way")
    parser.add_argument("--clips", type=int, default=12)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps} has to be more than the {WARM_UP} that are left out")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or folder / "model"
        if not options.model:
            build_untrained_model(model)
        data = {
            "manifest": write_clips(folder, options.clips, options.frames, options.height, options.width),
            "num_scenes": options.scenes,
            "num_frames": options.frames,
            "height": options.height,
            "width": options.width,
            "max_stride": STRIDE,
            "num_windows": 1,
        }
        sample = [f"data.{key}={value}" for key, value in data.items()]
        cache = f"data.cache={folder / 'cache'}"
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
        run("mask2dit.data.cache", ["configs/data/cache.yaml", f"model={model}", *sample, cache, f"dtype={dtype}"])
        training = [
            f"model={model}",
            *sample,
            f"batch_size={options.batch_size}",
            f"micro_batch_size={options.batch_size}",
            f"num_workers={options.workers}",
            f"precision={options.precision}",
            f"max_steps={options.steps}",
            "deepspeed=null",
            "trackers=[]",
            "log_every=1",
        ]
        backend = f"attention_backend={options.attention_backend}"
        ways = {
            "on the fly": [],
            "cached": [cache],
            "… and backend": [cache, backend],
            "… and compiled": [cache, "compile=true"],
            "… and both": [cache, backend, "compile=true"],
        }
        results = {way: [] for way in ways}
        for number in range(options.runs):
            for way, extra in ways.items():
                results[way].append(measure(folder / f"{list(ways).index(way)}_{number}", [*training, *extra]))

    median = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for way, runs in results.items()
    }
    print(
        f"{'':15}{'step (s)':>10}{'data wait':>11}{'peak (GiB)':>12}{'step, ratio (min-max)':>26}{'peak, ratio':>13}"
    )
    for way, values in median.items():
        ratios = [mine["seconds"] / base["seconds"] for mine, base in zip(results[way], results["on the fly"])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = values["peak_gib"] / median["on the fly"]["peak_gib"]
        print(
            f"{way:15}{values['seconds']:10.3f}{values['data_wait']:11.1%}{values['peak_gib']:12.2f}{spread:>26}{memory:13.2f}"
        )


if __name__ == "__main__":
    main()
