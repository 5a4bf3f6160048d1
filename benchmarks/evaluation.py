"""What is claimed about the evaluation: the Fréchet distance against `scipy.linalg.sqrtm`, and the memory that extracting
features takes.

    python benchmarks/evaluation.py [--samples 150] [--dimensions 1408] [--runs 5]

Needs scipy, which nothing else does.
"""

import argparse
import resource
import statistics
import time

import numpy as np
import scipy.linalg
import torch

from mask2dit.encoders.fvd import FeatureExtractor, VideoMAE
from mask2dit.evaluation.frechet import frechet_distance_of_features
from mask2dit.reporting.tables import markdown_table


def distance_by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    """The usual way: the root of the product of the covariances, of which the imaginary part is dropped."""
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    between_means = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    return float(between_means + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


def features(samples: int, dimensions: int, seed: int, shift: float) -> np.ndarray:
    """Features whose variances fall off as those of a network do."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions) * np.geomspace(1, 1e-2, dimensions)
    return shift + rng.normal(size=(samples, dimensions)) @ mixing.T


def seconds(call, runs: int) -> tuple[float, float]:
    """The median time of a call, and its result."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extraction_memory(scenes: int) -> tuple[float, float]:
    """MiB by which the peak grows over the first batch's, and MiB that all clips would take together."""
    extract = FeatureExtractor(VideoMAE(width=64, depth=2, heads=2, hidden=128), (0.0, 1.0), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def batch() -> list[torch.Tensor]:
        return [torch.randint(256, (16, 240, 360, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]

    rows = [extract(batch())]
    after_first = peak_mib()
    rows += [extract(batch()) for _ in range(scenes // 3 - 1)]
    assert sum(map(len, rows)) == scenes
    return peak_mib() - after_first, scenes * 16 * 240 * 360 * 3 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of the evaluation.")
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--dimensions", type=int, default=1408)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()

    first = features(arguments.samples, arguments.dimensions, 0, 0.0)
    second = features(arguments.samples, arguments.dimensions, 1, 0.1)
    ours, distance = seconds(lambda: frechet_distance_of_features(first, second), arguments.runs)
    usual, expected = seconds(lambda: distance_by_sqrtm(first, second), max(1, arguments.runs // 3))
    print(f"{arguments.samples} samples of {arguments.dimensions} dimensions, {torch.get_num_threads()} threads\n")
    rows = [
        ["singular values", f"{ours:.4f}", f"{distance:.9f}"],
        ["scipy.linalg.sqrtm", f"{usual:.2f}", f"{expected:.9f}"],
    ]
    print(markdown_table(["", "seconds", "distance"], rows), end="\n\n")
    print(f"{usual / ours:.0f}x faster, relative difference {abs(distance - expected) / abs(expected):.1e}")
    grown, together = extraction_memory(150)
    print(
        f"features of 150 scenes: the peak grew by {grown:.0f} MiB after the first batch; all clips are {together:.0f} MiB"
    )


if __name__ == "__main__":
    main()
