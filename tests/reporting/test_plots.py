import re
from xml.etree import ElementTree

import matplotlib
import pytest

from mask2dit.reporting.bootstrap import mean_interval
from mask2dit.reporting.plots import heat_map, histogram, interval_plot, line_plot, scatter_plot

ROWS = [(title, [mean_interval([70.0, 80.0]), mean_interval([60.0, 75.0])]) for title in ("A", "B", "C")]
PLOTS = {
    "intervals": lambda: interval_plot(ROWS, ["one", "two"]),
    "scatter": lambda: scatter_plot([("x", 1, 2), ("y", 3, 4)], "across", "up"),
    "lines": lambda: line_plot({"first": [(2, 0.5), (3, 0.7)], "second": [(3, 0.1)]}, "scene", "share"),
    "heat map": lambda: heat_map([[100, 40], [40, 100]], "Similarity of scenes"),
    "histogram": lambda: histogram([0.1, 0.2, 0.2, 0.9], "cosine", {"threshold": 0.5}, {"paper's 0": 0.0}),
}


def texts(svg: str, tag: str = "text") -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


@pytest.mark.parametrize(
    "name, labels",
    [
        ("intervals", {"A", "B", "C", "one", "two"}),
        ("scatter", {"across", "up"}),
        ("lines", {"first", "second", "scene", "share", "2", "3", "0.0", "1.0"}),
        ("heat map", {"1", "2", "100", "40"}),
        ("histogram", {"cosine (n = 4)", "threshold", "paper's 0", "count"}),
    ],
)
def test_plots_hold_their_labels_as_text(name, labels):
    assert labels <= set(texts(PLOTS[name]()))


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_the_same_each_time_and_stand_alone(name):
    svg = PLOTS[name]()
    assert PLOTS[name]() == svg
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert root.get("width").isdigit()
    assert "<metadata" not in svg and "<style" not in svg and "font-family: " not in svg
    ids = re.findall(r' id="(.+?)"', svg)
    assert len(ids) == len(set(ids)) and all(f"#{name}" in svg for name in ids)


def test_every_run_story_and_bar_has_a_tooltip():
    tips = texts(interval_plot([*ROWS, ("D", [None, None])], ["one", "two"]), "title")
    assert len(tips) == 2 * 2 * 3 and "one: 75.00 (70.00 to 80.00), 2 stories" in tips
    assert texts(PLOTS["scatter"](), "title") == ["x: 1.00, 2.00", "y: 3.00, 4.00"]
    assert len(texts(PLOTS["lines"](), "title")) == 3
    counts = [tip.rpartition(" ")[2] for tip in texts(PLOTS["histogram"](), "title")]
    assert counts == ["1", "2", "1"]


def test_without_data_there_is_no_plot():
    assert interval_plot([("a", [None])], ["b"]) == scatter_plot([], "a", "b") == ""


def test_names_are_shown_as_they_are(recwarn):
    names = ["$a$ costs $b$", "_hidden", "a <b> & c", "故事", "x" * 200]
    shown = texts(interval_plot([("Measure", [mean_interval([1.0])] * len(names))], names))
    assert set(names[:4]) <= set(shown)
    assert not list(recwarn)


def test_settings_of_the_user_do_not_change_a_plot():
    before = PLOTS["intervals"]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert PLOTS["intervals"]() == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("values", [[3.0], [0.5, 0.5, 0.5]])
def test_equal_values_have_a_histogram(values):
    assert f"seconds (n = {len(values)})" in texts(histogram(values, "seconds", {}))
