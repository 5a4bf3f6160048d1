"""Distances between two sets of videos by their features: Fréchet (FVD, arXiv 1812.01717) and kernel (KID, arXiv 1801.01401).

Shapes: N samples, D dimensions. Everything is computed in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of features, accumulated batch by batch.

    Batches are merged by the update of Chan, Golub and LeVeque, which avoids the cancellation of a sum of squares.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0
    """Sum of the outer products of deviations from the mean, (D, D)."""

    def add(self, features: np.ndarray) -> None:
        """Adds features (N, D)."""
        features = _checked(features)
        count, mean = len(features), features.mean(axis=0)
        centred = features - mean
        delta = mean - self.mean
        total = self.count + count
        self.scatter = self.scatter + centred.T @ centred + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, (D, D)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, but there are {self.count}")
        return self.scatter / (self.count - 1)

    @classmethod
    def of(cls, batches: Iterable[np.ndarray]) -> "FeatureStatistics":
        """The statistics of batches of features (N, D)."""
        statistics = cls()
        for batch in batches:
            statistics.add(batch)
        return statistics


def frechet_distance(
    first: FeatureStatistics, second: FeatureStatistics, allow_different_sizes: bool = False
) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two Gaussians with these means and covariances.

    The trace of (C1 C2)^½ equals that of (R C2 R)^½, with R the symmetric root of C1. Symmetric matrices have real
    eigenvalues, while a numerical root of the product may be complex.

    Raises:
        ValueError: if the sets differ in dimensions; or in size, on which the bias depends, unless that is allowed.
    """
    _check_sizes(first.count, second.count, allow_different_sizes)
    c1, c2 = first.covariance, second.covariance
    if c1.shape != c2.shape:
        raise ValueError(f"features have {len(c1)} and {len(c2)} dimensions: use one extractor for both sets")
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(np.sum((first.mean - second.mean) ** 2) + np.trace(c1) + np.trace(c2) - 2 * trace_of_root)


def frechet_distance_of_features(first: np.ndarray, second: np.ndarray, allow_different_sizes: bool = False) -> float:
    """The Fréchet distance from features (N, D).

    With fewer samples than dimensions, no covariance is formed: with X and Y centred and divided by (N - 1)^½, the nonzero
    eigenvalues of C1 C2 = XᵀX YᵀY are the squared singular values of X Yᵀ, which is only N x N.

    Raises:
        ValueError: as `frechet_distance`.
    """
    first, second = _checked(first), _checked(second)
    _check_sizes(len(first), len(second), allow_different_sizes)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features have {first.shape[1]} and {second.shape[1]} dimensions: use one extractor for both sets"
        )
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least 2 samples in each set")
    if max(len(first), len(second)) >= first.shape[1]:
        statistics = (FeatureStatistics.of([features]) for features in (first, second))
        return frechet_distance(*statistics, allow_different_sizes)
    x, y = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (first, second))
    trace_of_root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    between_means = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    return float(between_means + np.sum(x**2) + np.sum(y**2) - 2 * trace_of_root)


def kernel_distance(first: np.ndarray, second: np.ndarray, allow_different_sizes: bool = False) -> float:
    """The unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³, from features (N, D).

    Its expectation does not depend on the number of samples, unlike that of the Fréchet distance. It may be negative.

    Raises:
        ValueError: as `frechet_distance`.
    """
    first, second = _checked(first), _checked(second)
    _check_sizes(len(first), len(second), allow_different_sizes)
    if min(len(first), len(second)) < 2:
        raise ValueError("a kernel distance needs at least 2 samples in each set")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features have to be (N, D) with at least one sample, but are {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite: the extractor's weights or a video are damaged")
    return features


def _check_sizes(first: int, second: int, allow_different_sizes: bool) -> None:
    if first != second and not allow_different_sizes:
        raise ValueError(
            f"the sets have {first} and {second} samples, and a Fréchet distance depends on how many there are: take equally "
            "many, or set frechet.allow_different_sizes=true"
        )
