import dataclasses
import re
from html.parser import HTMLParser

import pytest

from mask2dit.evaluation.measures.base import Column
from mask2dit.evaluation.report import (
    comparison_table,
    consistency_table,
    correlation_table,
    measured_differently,
    summary_table,
    write_report,
)
from mask2dit.evaluation.results import Fault, Results, StoryResult

COLUMNS = [
    Column("visual", "Visual"),
    Column("semantic", "Semantic"),
    Column("sequence", "Sequence"),
    Column("cut_deviation", "Deviation", "lower"),
]


def make_results(visual: list[float], **changes) -> Results:
    stories = [
        StoryResult(
            name=f"story-{i}",
            title=f"Story <{i}> | & more",
            prompts=["one", "two"],
            video="nowhere.mp4",
            scenes=[[0, 9], [9, 18]],
            values={"visual": value, "semantic": 20.0 + i, "sequence": (value + 20 + i) / 2, "cut_deviation": None},
            details={"consistency": {"similarity": [[100, value], [value, 100]]}},
        )
        for i, value in enumerate(visual)
    ]
    settings = {
        "name": "ours",
        "stories": stories,
        "columns": COLUMNS,
        "measured_by": {column.key: "viclip" for column in COLUMNS},
        "distances": {},
        "off": {},
        "faults": [],
        "notes": [],
        "settings": {},
        "versions": {"torch": "2"},
    }
    return Results(**{**settings, **changes})


class Balance(HTMLParser):
    """Fails on tags that are not closed in order."""

    VOID = {"meta", "img", "br", "input"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_results_are_read_as_they_were_written(tmp_path):
    results = make_results([70.0, 80.0], faults=[Fault(story="a", stage="video", fault="b")], notes=["c"])
    results.write(tmp_path)
    assert Results.read(tmp_path) == results
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == "story,visual,semantic,sequence,cut_deviation"
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json is damaged.*evaluate that run again"):
        Results.read(tmp_path)


def test_the_page_is_whole_and_self_contained(tmp_path):
    other = make_results([60.0, 70.0, 50.0], name="other")
    results = make_results(
        [70.0, 80.0, 90.0], off={"judge": "not asked for"}, faults=[Fault(story="a", stage="b", fault="c")]
    )
    page = write_report(results, tmp_path, [other]).read_text()
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "Story &lt;0&gt; | &amp; more" in page and "<0>" not in page
    assert page.index("Best by sequence") < page.index("Worst by sequence") < page.index("Every story")
    assert "ours minus other" in page and "not asked for" in page and "1 fault:" in page


def test_markdown_tables_keep_their_columns(tmp_path):
    write_report(make_results([70.0], faults=[Fault(story="a | b", stage="c", fault="d")]), tmp_path)
    assert "| a \\| b | c | d |" in (tmp_path / "report.md").read_text()


def test_the_papers_rows_are_marked_as_reported():
    heads, rows = consistency_table([make_results([70.0, 80.0], distances={"i3d": {"frechet": 123.456}})])
    assert heads == ["", "Visual", "Semantic", "Sequence", "FVD"]
    assert rows[0] == ["ours", "75.00", "20.50", "47.75", "123.46"]
    assert ["Mask²DiT-5B (reported)", "89.21", "20.81", "55.01", "607.64"] in rows
    assert all(row[0].endswith("(reported)") for row in rows[1:])


def test_columns_without_values_are_shown_as_such():
    _, rows = summary_table(make_results([70.0, 80.0]))
    assert rows[0] == ["Visual ↑", "75.00", "70.00 … 80.00", "2"]
    assert rows[3] == ["Deviation ↓", "–", "–", "0"]


def test_runs_are_compared_story_by_story():
    ours, other = make_results([70.0, 90.0] * 8), make_results([69.0, 89.0] * 8)
    _, rows = comparison_table(ours, other)
    assert rows[0] == ["Visual ↑", "+1.00", "+1.00 … +1.00", "16", "better"]
    assert rows[1] == ["Semantic ↑", "+0.00", "+0.00 … +0.00", "16", "no clear difference"]
    assert comparison_table(make_results([70.0, 90.0] * 7), other)[1][0][-2:] == ["14", "too few stories"]
    assert comparison_table(other, ours)[1][0][-1] == "worse"


def test_untrained_scores_get_no_verdict(tmp_path):
    ours, other = make_results([70.0, 90.0] * 8, untrained=["visual"]), make_results([69.0, 89.0] * 8)
    for first, second in ((ours, other), (other, ours)):
        verdicts = [row[-1] for row in comparison_table(first, second)[1]]
        assert verdicts[0] == "untrained" and "untrained" not in verdicts[1:]
    ours.write(tmp_path)
    assert Results.read(tmp_path).untrained == ["visual"]


def test_what_was_measured_in_another_way_or_of_other_texts_is_not_compared():
    ours = make_results([70.0, 90.0, 50.0])
    other = make_results([69.0, 89.0, 49.0], measured_by={**ours.measured_by, "visual": "another viclip"})
    other.stories[0].prompts[0] = "another text"
    rows = comparison_table(ours, other)[1]
    assert [row[0] for row in rows] == ["Semantic ↑", "Sequence ↑"]
    assert {row[3] for row in rows} == {"2"}
    assert measured_differently(ours, other) == [COLUMNS[0]]


def test_learned_scores_are_correlated_with_the_truth(tmp_path):
    columns = [COLUMNS[0], Column("semantic", "True semantic", truth_of="visual")]
    results = make_results([70.0, 80.0, 90.0], columns=columns)
    heads, rows = correlation_table(results)
    assert heads == ["", "True semantic"]
    assert rows == [["Visual", "+1.00 (+1.00 … +1.00)"]]
    assert correlation_table(make_results([9.0, 8.0, 7.0], columns=columns))[1][0][1].startswith("-1.00")
    page = write_report(results, tmp_path).read_text()
    assert "Learned scores against the truth" in page and ">True semantic</text>" in page


def test_a_run_without_any_value_still_has_a_report(tmp_path):
    results = make_results([])
    assert write_report(dataclasses.replace(results, columns=[]), tmp_path).is_file()
