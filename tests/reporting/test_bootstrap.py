import numpy as np
import pytest

from mask2dit.reporting.bootstrap import mean_interval, paired_difference, rank_correlation


def test_an_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3, 1, 50)) for _ in range(100)]
    assert 88 <= sum(interval.low <= 3 <= interval.high for interval in intervals) <= 100


def test_equal_values_have_no_width_and_none_have_no_interval():
    interval = mean_interval([2.0, 2.0])
    assert (interval.value, interval.low, interval.high, interval.count) == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="at least one story"):
        mean_interval([])


def test_paired_differences_see_through_what_stories_have_in_common():
    base = {str(i): float(100 * i) for i in range(20)}
    better = {story: value + 1 for story, value in base.items()} | {"only here": 5.0}
    interval = paired_difference(base, better)
    assert (interval.low, interval.high, interval.count) == (pytest.approx(1), pytest.approx(1), 20)
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def test_rank_correlation_knows_order_ties_and_too_little():
    a = {"1": 1.0, "2": 2.0, "3": 30.0}
    assert rank_correlation(a, {"1": 0.1, "2": 5.0, "3": 6.0}).value == pytest.approx(1)
    assert rank_correlation(a, {"1": 3.0, "2": 2.0, "3": 1.0}).value == pytest.approx(-1)
    assert rank_correlation(a, {"1": 1.0, "2": 1.0, "3": 2.0}).value == pytest.approx(np.sqrt(3) / 2)
    assert rank_correlation(a, {"1": 1.0, "2": 1.0, "3": 1.0}) is None
    assert rank_correlation(a, {"1": 1.0, "2": 2.0}) is None


def test_the_interval_of_a_correlation_covers_none_where_there_is_none():
    rng = np.random.default_rng(0)
    intervals = []
    for _ in range(40):
        first, second = ({str(i): value for i, value in enumerate(rng.normal(size=40))} for _ in range(2))
        intervals.append(rank_correlation(first, second))
    assert sum(interval.low <= 0 <= interval.high for interval in intervals) >= 34
    first = {str(i): float(i) for i in range(40)}
    noisy = {story: value + rng.normal(0, 8) for story, value in first.items()}
    interval = rank_correlation(first, noisy)
    assert 0.5 < interval.low < interval.value < interval.high < 1
    assert interval.count == 40
