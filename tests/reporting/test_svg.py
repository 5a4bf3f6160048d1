import pytest

from mask2dit.reporting.bootstrap import mean_interval
from mask2dit.reporting.svg import _ticks, heat_map, interval_plot, scatter_plot


def test_plots_hold_every_run_and_story():
    rows = [(title, [mean_interval([70.0, 80.0]), mean_interval([60.0, 75.0])]) for title in ("A", "B", "C")]
    rows.append(("D", [None, None]))
    assert interval_plot(rows, ["a", "b"]).count("<circle") == 2 + 2 * 3
    assert scatter_plot([("x", 1, 2), ("y", 3, 4)], "a", "b").count("<circle") == 2
    assert heat_map([[100, 40], [40, 100]]).count("<rect") == 4
    assert interval_plot([("a", [None])], ["b"]) == scatter_plot([], "a", "b") == ""


@pytest.mark.parametrize("low, high", [(0, 100), (-12.3, 99.8), (99.80, 99.81), (0, 0.003)])
def test_ticks_are_round_and_within_the_axis(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
