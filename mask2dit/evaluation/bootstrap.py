"""Confidence intervals by resampling stories, which are the unit that varies: scenes of one story are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over stories with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int
    """Stories that have a value."""


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one value a story with its percentile bootstrap interval; a single story's interval is the value itself.

    Raises:
        ValueError: if there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one story")
    chosen = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(first: dict[str, float], second: dict[str, float], seed: int = 0) -> Interval | None:
    """How much larger the second run's values are, over the stories that both have; None if they share none."""
    shared = sorted(first.keys() & second.keys())
    return mean_interval([second[story] - first[story] for story in shared], seed) if shared else None


def rank_correlation(first: dict[str, float], second: dict[str, float]) -> float | None:
    """Spearman's correlation over the stories that both have; None for fewer than three, or where one does not vary."""
    shared = sorted(first.keys() & second.keys())
    ranks = [_ranks(np.array([values[story] for story in shared])) for values in (first, second)]
    if len(shared) < 3 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    return np.array([(np.sum(values < value) + np.sum(values <= value) - 1) / 2 for value in values])
