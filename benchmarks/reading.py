"""The cost of exact reading: clips per second of `open_video` and of decord, whose seeking is not exact for every file.

A run opens a clip and reads frames at a stride from a random start, as training does. The two readers alternate on the same
clip and start. The CPU time of all threads is measured, since data loaders run one reader per core: clips per second are per
second of one core. The table shows medians and the median of the ratios.

    python benchmarks/reading.py
    python benchmarks/reading.py --height 720 --width 1280 --frames 600 --runs 30

Both readers are compared with decoding in order, and the table counts frames that differ from those requested.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import decord
import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.video.reading import open_video

ENCODERS = {
    "H.264, closed GOP, mp4": "-c:v libx264 -pix_fmt yuv420p -crf 20 -g 48 out.mp4",
    "HEVC, open GOP, mp4": "-c:v libx265 -pix_fmt yuv420p -crf 22 -x265-params log-level=none:keyint=48 out.mp4",
    "H.264, closed GOP, mkv": "-c:v libx264 -pix_fmt yuv420p -crf 20 -g 48 out.mkv",
    "MPEG-4, avi": "-c:v mpeg4 -q:v 3 -bf 2 out.avi",
}


def encode(folder: Path, arguments: str, height: int, width: int, frames: int) -> Path:
    source = f"-f lavfi -i testsrc2=s={width}x{height}:r=24:d={frames / 24} -vf noise=alls=8:allf=t".split()
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *source, *arguments.split()], cwd=folder, check=True)
    return folder / arguments.split()[-1]


def by_open_video(path: Path, indices: list[int]) -> np.ndarray:
    return open_video(path).read(indices).numpy()


def by_decord(path: Path, indices: list[int]) -> np.ndarray:
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1).get_batch(indices).asnumpy()


def in_order(path: Path) -> list[np.ndarray]:
    """Thumbnails of all frames, which suffice to distinguish them."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24")[::8, ::8] for frame in container.decode(video=0)]


def seconds(read: Callable, path: Path, indices: list[int]) -> tuple[float, np.ndarray]:
    started = time.process_time()
    frames = read(path, indices)
    return time.process_time() - started, frames[:, ::8, ::8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--frames", type=int, default=480, help="of a clip")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 49, 147], help="frames of a read")
    parser.add_argument("--stride", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    random = np.random.default_rng(0)

    print(f"{options.width}x{options.height}, clips of {options.frames} frames, stride {options.stride}\n")
    print(
        "| clip | frames | exact, clips/s | decord, clips/s | exact/decord (min … max) | other frames: exact | decord |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, arguments in ENCODERS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = encode(Path(folder), arguments, options.height, options.width, options.frames)
            reference = in_order(path)
            for length in options.lengths:
                span = (length - 1) * options.stride + 1
                times, wrong, total = {by_open_video: [], by_decord: []}, {by_open_video: 0, by_decord: 0}, 0
                for run in range(options.runs):
                    start = int(random.integers(len(reference) - span + 1))
                    indices = list(range(start, start + span, options.stride))
                    total += length
                    for read in (by_open_video, by_decord)[:: 1 if run % 2 else -1]:
                        took, frames = seconds(read, path, indices)
                        times[read].append(took)
                        wrong[read] += sum(
                            not np.array_equal(frame, reference[i]) for frame, i in zip(frames, indices)
                        )
                ratios = [other / exact for exact, other in zip(times[by_open_video], times[by_decord])]
                exact, other = (1 / statistics.median(times[read]) for read in (by_open_video, by_decord))
                print(
                    f"| {name} | {length} | {exact:.2f} | {other:.2f} "
                    f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} … {max(ratios):.2f}) "
                    f"| {wrong[by_open_video]} of {total} | {wrong[by_decord]} of {total} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
