"""Near-identical clips: how many changed copies are found, how many different clips are taken for copies, and how the search
scales.

The copies are made from a folder of clips, each of one shot: encoded again at half the size, with ends trimmed, brighter,
with a logo, cropped by 5%, at half the frame rate, the middle half alone, and mirrored, which is another picture. Different
clips are all pairs of clips of the folder. Prints of frames are compared alone, without ViCLIP's features.

    python benchmarks/duplicates.py
    python benchmarks/duplicates.py --clips MY/CLIPS --search 10000 100000
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mask2dit.curation.config import DuplicatesConfig
from mask2dit.curation.duplicates import _candidates, matched_share
from mask2dit.curation.embed import frame_prints
from mask2dit.reporting.tables import markdown_table
from mask2dit.video.files import list_videos
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import VideoReader, open_video
from mask2dit.video.writing import write_video

ROOT = Path(__file__).parents[1]
NUM_FRAMES = 8  # as ViCLIP takes
THRESHOLDS = (0.95, 0.97, 0.98, 0.99)


def encoded(frames: torch.Tensor, folder: Path) -> torch.Tensor:
    """Frames after encoding at half the size."""
    small = F.interpolate(frames.permute(0, 3, 1, 2).float(), scale_factor=0.5, mode="bilinear", antialias=True)
    small = small[:, :, : small.shape[2] // 2 * 2, : small.shape[3] // 2 * 2].round().byte().permute(0, 2, 3, 1)
    write_video(folder / "copy.mp4", small.numpy(), 25.0)
    reader = open_video(folder / "copy.mp4")
    return reader.read(range(reader.num_frames))


def with_logo(frames: torch.Tensor) -> torch.Tensor:
    frames = frames.clone()
    height, width = frames.shape[1:3]
    frames[:, height // 20 : height // 8, width // 20 : width // 5] = 255
    return frames


def cropped(frames: torch.Tensor) -> torch.Tensor:
    top, left = frames.shape[1] // 40, frames.shape[2] // 40
    return frames[:, top:-top, left:-left]


COPIES: dict[str, Callable[[torch.Tensor, Path], torch.Tensor]] = {
    "half the size": encoded,
    "trimmed by 10%": lambda frames, _: frames[len(frames) // 10 :],
    "brighter": lambda frames, _: (frames.float() * 1.15 + 10).clamp(0, 255).byte(),
    "logo": lambda frames, _: with_logo(frames),
    "cropped by 5%": lambda frames, _: cropped(frames),
    "half the rate": lambda frames, _: frames[::2],
    "middle half": lambda frames, _: frames[len(frames) // 4 : -(len(frames) // 4)],
    "mirrored": lambda frames, _: frames.flip(2),
}


def prints(frames: torch.Tensor) -> np.ndarray:
    return frame_prints(frames[middle_frames(0, len(frames), NUM_FRAMES)]).astype(np.float32)


def read(reader: VideoReader) -> torch.Tensor:
    """All frames of a clip, at most 640 wide."""
    step = max(1, round(reader.width / 640))
    parts = [reader.read(range(i, min(i + 16, reader.num_frames))) for i in range(0, reader.num_frames, 16)]
    return torch.cat([part[:, ::step, ::step] for part in parts])


def search(num_clips: int) -> tuple[float, int]:
    """Seconds of the search among random clips, a tenth of them with a noisy copy, and the number of pairs that are found."""
    random = np.random.default_rng(0)
    originals = random.normal(size=(num_clips - num_clips // 10, NUM_FRAMES, 192)).astype(np.float32)
    noise = 0.1 * random.normal(size=(num_clips // 10, NUM_FRAMES, 192)).astype(np.float32)
    vectors = np.concatenate([originals, originals[: num_clips // 10] + noise])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    started = time.process_time()
    found = _candidates(vectors, DuplicatesConfig().threshold)
    return time.process_time() - started, len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / "datasets/extension", help="folder of clips of one shot")
    parser.add_argument("--search", type=int, nargs="*", default=[1000, 10000], help="numbers of clips of the search")
    options = parser.parse_args()
    clips = [read(open_video(path)) for path in list_videos(options.clips)]
    originals = [prints(clip) for clip in clips]
    min_share = DuplicatesConfig().min_share

    with tempfile.TemporaryDirectory() as folder:
        copies = {name: [prints(make(clip, Path(folder))) for clip in clips] for name, make in COPIES.items()}
    rows = []
    for threshold in THRESHOLDS:

        def is_twin(short: np.ndarray, long: np.ndarray, threshold: float = threshold) -> bool:
            return matched_share(short, long, threshold)[0] >= min_share

        found = [
            f"{sum(is_twin(copy, original) for copy, original in zip(of_kind, originals))}/{len(clips)}"
            for of_kind in copies.values()
        ]
        pairs = list(combinations(originals, 2))
        rows.append([f"{threshold:g}", *found, f"{sum(is_twin(*pair) for pair in pairs)}/{len(pairs)}"])
    print(markdown_table(["threshold", *COPIES, "different clips"], rows))

    rows = []
    for num_clips in options.search:
        seconds, num_found = search(num_clips)
        rows.append([str(num_clips), f"{seconds:.1f}", f"{num_found}/{num_clips // 10}"])
    print("\n" + markdown_table(["clips", "CPU s of the search", "pairs found"], rows))


if __name__ == "__main__":
    main()
