"""Confidence intervals by resampling stories, which are the unit that varies: scenes of one story are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """What holds over stories, such as a mean, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    count: int
    """Stories that have a value."""


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one value a story with its percentile bootstrap interval; a single story's interval is the value itself.

    Raises:
        ValueError: if there is no value.
    """
    of_story = np.asarray(values, dtype=np.float64)
    if not len(of_story):
        raise ValueError("an interval needs at least one story")
    chosen = np.random.default_rng(seed).integers(len(of_story), size=(NUM_RESAMPLES, len(of_story)))
    low, high = np.percentile(of_story[chosen].mean(axis=1), [2.5, 97.5])
    return Interval(float(of_story.mean()), float(low), float(high), len(of_story))


def paired_difference(first: dict[str, float], second: dict[str, float], seed: int = 0) -> Interval | None:
    """How much larger the second run's values are, over the stories that both have; None if they share none."""
    shared = sorted(first.keys() & second.keys())
    return mean_interval([second[story] - first[story] for story in shared], seed) if shared else None


def rank_correlation(first: dict[str, float], second: dict[str, float], seed: int = 0) -> Interval | None:
    """Spearman's correlation over the stories that both have; None for fewer than three, or where one does not vary.

    Resamples in which one does not vary have no correlation and are left out of the interval.
    """
    shared = sorted(first.keys() & second.keys())
    count = len(shared)
    values = [np.array([scores[story] for story in shared]) for scores in (first, second)]
    if count < 3 or any(np.ptp(of_run) == 0 for of_run in values):
        return None
    # A row a resample, of how often each story is in it; the first one is the stories themselves.
    resamples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES)
    weights = np.vstack([np.ones(count), resamples])
    ranks = [weights @ _precedes(of_run) for of_run in values]
    a, b = (of_run - (weights * of_run).sum(1, keepdims=True) / count for of_run in ranks)
    variances = (weights * a**2).sum(1) * (weights * b**2).sum(1)
    varies = variances > 1e-9
    correlations = (weights * a * b).sum(1)[varies] / np.sqrt(variances[varies])
    low, high = np.percentile(correlations[1:], [2.5, 97.5])
    return Interval(float(correlations[0]), float(low), float(high), count)


def _precedes(values: np.ndarray) -> np.ndarray:
    """(N, N): 1 where the story of a row lies below that of a column, a half where they are equal. Counts of stories, (R, N),
    times this are ranks, ties sharing their mean."""
    below = values[:, None] < values[None, :]
    return below + 0.5 * (values[:, None] == values[None, :])
