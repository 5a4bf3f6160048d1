"""Precision and recall of the detectors of cuts, by kind of transition, on films whose cuts are known.

The films are made from a folder of clips, each of one shot. A film shows two shots with one transition between them, at a
known place, or one shot without a transition:

- hard: a cut between two clips;
- like colours: a cut to a closer view of another part of the same clip, whose colours are nearly the same;
- dissolve: the second clip replaces the first gradually, in 0.2, 0.5 or 1 s;
- fade: the first clip fades to black and the second fades in, in 1 s;
- flash: one shot with a white flash of two frames, which is not a cut;
- pan: one shot through which a view of a third of the width moves from one side to the other in half a second, which is not
  a cut;
- none: one shot as it is.

A transition counts as found if a detected cut lies in it, or up to `--tolerance` frames outside. All other detected cuts
are false.

    python benchmarks/cuts.py
    python benchmarks/cuts.py --clips MY/CLIPS --films 12
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mask2dit.curation.config import SplitConfig
from mask2dit.curation.split import load_detector
from mask2dit.reporting.tables import markdown_table
from mask2dit.video.cuts import Transition
from mask2dit.video.files import list_videos
from mask2dit.video.reading import ArrayReader, open_video

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH, FPS = 180, 320, 25
SHOT = 60  # frames of a shot before and after a transition
DETECTORS = (["transnet"], ["content"], ["adaptive"], ["content", "fades"])
Film = tuple[np.ndarray, tuple[int, int] | None]


def read_shot(path: Path) -> np.ndarray:
    """The first frames of a clip, `float32 (F, H, W, 3)`."""
    reader = open_video(path)
    frames = reader.read(range(min(reader.num_frames, 2 * SHOT))).permute(0, 3, 1, 2).float()
    return F.interpolate(frames, (HEIGHT, WIDTH), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def closer(shot: np.ndarray, corner: int) -> np.ndarray:
    """The view of a corner of the picture, 60% of its width, enlarged to the whole size."""
    height, width = round(0.6 * HEIGHT), round(0.6 * WIDTH)
    top, left = (HEIGHT - height) * (corner // 2), (WIDTH - width) * (corner % 2)
    part = torch.from_numpy(shot[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    return F.interpolate(part, (HEIGHT, WIDTH), mode="bilinear").permute(0, 2, 3, 1).numpy()


def hard(first: np.ndarray, second: np.ndarray) -> Film:
    before, after = first[:SHOT], second[:SHOT]
    return np.concatenate([before, after]), (len(before), len(before))


def like_colours(first: np.ndarray, second: np.ndarray) -> Film:
    middle = len(first) // 2
    return np.concatenate([closer(first[:middle], 0), closer(first[middle:], 3)]), (middle, middle)


def dissolve(seconds: float) -> Callable[[np.ndarray, np.ndarray], Film]:
    def make(first: np.ndarray, second: np.ndarray) -> Film:
        length = round(seconds * FPS)
        share = ((np.arange(length) + 1) / (length + 1))[:, None, None, None].astype(np.float32)
        start = min(len(first) - length, SHOT)
        mixed = (1 - share) * first[start : start + length] + share * second[:length]
        return np.concatenate([first[:start], mixed, second[length : length + SHOT]]), (start, start + length)

    return make


def fade(first: np.ndarray, second: np.ndarray) -> Film:
    length = FPS // 2
    light = np.linspace(1, 0, length, dtype=np.float32)[:, None, None, None]
    start = min(len(first) - length, SHOT)
    down, up = first[start : start + length] * light, second[:length] * light[::-1]
    return np.concatenate([first[:start], down, up, second[length : length + SHOT]]), (start, start + 2 * length)


def flash(first: np.ndarray, second: np.ndarray) -> Film:
    frames = first.copy()
    middle = len(frames) // 2
    frames[middle : middle + 2] = 0.2 * frames[middle : middle + 2] + 0.8 * 255
    return frames, None


def pan(first: np.ndarray, second: np.ndarray) -> Film:
    """The view rests, moves within half a second, and rests."""
    width = WIDTH // 3
    middle = len(first) // 2
    place = np.interp(np.arange(len(first)), [middle - FPS // 4, middle + FPS // 4], [0, WIDTH - width])
    views = [frame[:, round(left) : round(left) + width] for frame, left in zip(first, place)]
    stretched = F.interpolate(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), (HEIGHT, WIDTH), mode="bilinear")
    return stretched.permute(0, 2, 3, 1).numpy(), None


def none(first: np.ndarray, second: np.ndarray) -> Film:
    return first, None


KINDS = {
    "hard": hard,
    "like colours": like_colours,
    "dissolve 0.2 s": dissolve(0.2),
    "dissolve 0.5 s": dissolve(0.5),
    "dissolve 1 s": dissolve(1.0),
    "fade": fade,
    "flash": flash,
    "pan": pan,
    "none": none,
}


def compare(cuts: list[int], truth: tuple[int, int] | None, tolerance: int) -> tuple[bool, int]:
    """Whether the transition is found, and the number of false cuts. Further cuts within the transition are false too."""
    hits = [cut for cut in cuts if truth and truth[0] - tolerance <= cut <= truth[1] + tolerance]
    return bool(hits), len(cuts) - bool(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=ROOT / "datasets/extension", help="folder of clips of one shot")
    parser.add_argument("--films", type=int, default=6, help="of each kind")
    parser.add_argument("--tolerance", type=int, default=2, help="frames")
    options = parser.parse_args()
    shots = [read_shot(path) for path in list_videos(options.clips)]
    shots = [shot for shot in shots if len(shot) >= SHOT]
    if len(shots) < 2:
        sys.exit(f"{options.clips} needs two clips of at least {SHOT} frames")
    pairs = list(permutations(shots, 2))
    pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(options.films, len(pairs))).round().astype(int)]

    detectors = {
        " + ".join(names): [load_detector(name, SplitConfig(detectors=names, doubt_above=0.5)) for name in names]
        for names in DETECTORS
    }
    found = {name: dict.fromkeys(KINDS, 0) for name in detectors}
    false = {name: dict.fromkeys(KINDS, 0) for name in detectors}
    seconds, num_frames = dict.fromkeys(detectors, 0.0), 0
    for kind, make in KINDS.items():
        for first, second in pairs:
            frames, truth = make(first, second)
            reader = ArrayReader(frames.clip(0, 255).round().astype(np.uint8), float(FPS))
            num_frames += reader.num_frames
            for name, detect in detectors.items():
                started = time.process_time()
                changes = [change for one in detect for change in one(reader)]
                seconds[name] += time.process_time() - started
                cuts = sorted({change.cut if isinstance(change, Transition) else change for change in changes})
                is_found, num_false = compare(cuts, truth, options.tolerance)
                found[name][kind] += is_found
                false[name][kind] += num_false

    with_cut = [kind for kind, make in KINDS.items() if make(*pairs[0])[1]]
    print(f"{len(pairs)} films of each kind from {len(shots)} clips; a cell holds found transitions, and false cuts\n")
    rows = []
    for name in detectors:
        cells = [
            (f"{found[name][kind]}/{len(pairs)}" if kind in with_cut else "")
            + (f" (+{false[name][kind]})" if false[name][kind] or kind not in with_cut else "")
            for kind in KINDS
        ]
        hits, wrong = sum(found[name].values()), sum(false[name].values())
        precision, recall = hits / max(1, hits + wrong), hits / (len(with_cut) * len(pairs))
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        rates = [f"{precision:.2f}", f"{recall:.2f}", f"{f1:.2f}", f"{num_frames / seconds[name]:.0f}"]
        rows.append([name, *cells, *rates])
    print(markdown_table(["detector", *KINDS, "precision", "recall", "F1", "frames/CPU s"], rows))


if __name__ == "__main__":
    main()
