"""The report of a run: one self-contained HTML page, the same tables as Markdown, and the numbers as JSON lines and CSV."""

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mask2dit.evaluation.measures.base import Column
from mask2dit.evaluation.results import Results, StoryResult, shared_stories
from mask2dit.files import write_text
from mask2dit.reporting.bootstrap import Interval, paired_difference, rank_correlation
from mask2dit.reporting.pages import render
from mask2dit.reporting.plots import heat_map, interval_plot, scatter_plot
from mask2dit.reporting.tables import markdown_table
from mask2dit.video.reading import open_video

logger = logging.getLogger(__name__)

# Table 1 of the paper, and its extension: visual, semantic and sequence consistency, FVD.
REPORTED = (
    ("CogVideoX-2B", 55.01, 22.64, 38.82, 835.35),
    ("Mask²DiT-2B", 70.95, 23.94, 47.45, 720.01),
    ("CogVideoX-5B", 43.82, 20.70, 32.26, 613.47),
    ("Mask²DiT-5B", 89.21, 20.81, 55.01, 607.64),
    ("StoryDiffusion + CogVideoX-I2V", 69.06, 25.59, 47.32, 905.69),
    ("TALC", 67.47, 20.25, 43.86, 1516.59),
    ("VideoStudio", 61.28, 22.64, 41.96, 1213.88),
    ("Mask²DiT extension", 75.33, 24.29, 49.81, None),
)
REPORTED_NOTE = (
    "Rows marked as reported are the paper's (arXiv 2503.19881), with other prompts and another reference set: an "
    "orientation, and not a measurement of this project."
)
DISTANCE_NOTE = (
    "With few videos the Fréchet distance is biased by more than most effects: read it together with the kernel distance, "
    "whose expectation does not depend on their number."
)
TRUTH_NOTE = (
    "Spearman's correlation over stories, with its 95% bootstrap interval, of learned scores with what is known: what the "
    "stories of the small world show, read from their pixels."
)
MEASURES_NOTE = "Means over stories with their 95% bootstrap intervals."
STORIES_NOTE = "One dot per story. A story that never changes is at the lower right."
MIN_STORIES = 16  # for a verdict: bootstrap intervals of few stories are too narrow
NUM_SHOWN = 3  # best and worst stories
FRAMES_PER_SCENE = 4
THUMB_HEIGHT = 108
Table = tuple[list[str], list[list[str]]]  # heads, rows


@dataclass(frozen=True)
class Section:
    """A section of the report. Markdown has its table and note; the page also has its plots."""

    title: str
    table: Table | None = None
    note: str = ""
    figures: Sequence[str] = ()
    """Plots as SVG."""
    soft_rows: Sequence[int] = ()
    """Rows of the table that are de-emphasized."""
    is_text: bool = False
    """True if the table holds sentences instead of numbers."""


def write_report(results: Results, folder: Path, others: Sequence[Results] = ()) -> Path:
    """Writes `report.html`, `report.md`, `results.jsonl`, `results.csv` and `summary.json`.

    Args:
        results: results of this run.
        folder: an existing folder.
        others: runs to compare with.

    Returns:
        The path of the page.
    """
    results.write(folder)
    sections = _sections(results, others)
    write_text(folder / "report.md", _markdown(results, sections))
    write_text(folder / "report.html", _html(results, sections))
    return folder / "report.html"


def consistency_table(runs: Sequence[Results]) -> Table:
    """The paper's table: these runs, then the paper's rows."""
    rows = []
    for run in runs:
        cells = [_mean(run.interval(key)) for key in ("visual", "semantic", "sequence")]
        distance = run.distances.get("i3d", {}).get("frechet")
        rows.append([run.name, *cells, "–" if distance is None else f"{distance:.2f}"])
    for name, *values in REPORTED:
        rows.append([f"{name} (reported)", *("–" if value is None else f"{value:.2f}" for value in values)])
    return ["", "Visual", "Semantic", "Sequence", "FVD"], rows


def summary_table(results: Results) -> Table:
    """The mean of every column with its interval."""
    rows = []
    for column in results.columns:
        interval = results.interval(column.key)
        if interval is None:
            rows.append([_title(column), "–", "–", "0"])
        else:
            rows.append(
                [
                    _title(column),
                    f"{interval.value:.2f}",
                    f"{interval.low:.2f} … {interval.high:.2f}",
                    str(interval.count),
                ]
            )
    return ["Measure", "Mean", "95% interval", "Stories"], rows


def distance_table(results: Results) -> Table:
    rows = [
        [name, f"{values['frechet']:.3f}", f"{values['kernel']:.5f}", str(values["scenes"]), str(values["reference"])]
        for name, values in results.distances.items()
    ]
    return ["Features", "Fréchet distance", "Kernel distance", "Scenes", "Reference clips"], rows


def comparison_table(results: Results, other: Results) -> Table:
    """Differences over the stories that both runs have with the same prompts: this run minus the other.

    Columns measured differently are left out. Untrained scores and fewer than `MIN_STORIES` stories get no verdict.
    """
    same = set(shared_stories([results, other]))
    rows = []
    for column in results.columns:
        if column in measured_differently(results, other):
            continue
        ours = {name: value for name, value in results.values(column.key).items() if name in same}
        difference = paired_difference(other.values(column.key), ours)
        if difference is None:
            continue
        clear = difference.low > 0 or difference.high < 0
        better = {"higher": difference.value > 0, "lower": difference.value < 0}.get(column.better)
        if column.key in {*results.untrained, *other.untrained}:
            verdict = "untrained"
        elif difference.count < MIN_STORIES:
            verdict = "too few stories"
        elif not clear:
            verdict = "no clear difference"
        else:
            verdict = "differs" if better is None else "better" if better else "worse"
        span = f"{difference.low:+.2f} … {difference.high:+.2f}"
        rows.append([_title(column), f"{difference.value:+.2f}", span, str(difference.count), verdict])
    return ["Measure", "Difference", "95% interval", "Stories", "Verdict"], rows


def measured_differently(results: Results, other: Results) -> list[Column]:
    """Columns that the two runs measured with different weights or settings."""
    ours, theirs = results.measured_by, other.measured_by
    return [c for c in results.columns if c.key in theirs and theirs[c.key] != ours[c.key]]


def _comparison_note(results: Results, other: Results) -> str:
    note = (
        "Paired: only stories that both runs have with the same prompts, each compared with itself. Of twenty measures "
        "that do not differ, about one seems to by chance."
    )
    left_out = ", ".join(column.title for column in measured_differently(results, other))
    return f"{note} Measured in another way there, and left out: {left_out}." if left_out else note


def correlation_table(results: Results) -> Table:
    """Spearman's correlation over stories of learned columns (rows) with ground truth (columns)."""
    known = [column for column in results.columns if column.truth_of]
    rows = []
    for column in results.columns:
        found = [rank_correlation(results.values(column.key), results.values(truth.key)) for truth in known]
        if column.truth_of is None and any(found):
            cells = [f"{i.value:+.2f} ({i.low:+.2f} … {i.high:+.2f})" if i else "–" for i in found]
            rows.append([column.title, *cells])
    return ["", *(column.title for column in known)], rows


def _sections(results: Results, others: Sequence[Results]) -> list[Section]:
    """The sections of the report that hold numbers, in order."""
    runs = [results, *others]
    reported = range(len(runs), len(runs) + len(REPORTED))
    sections = [
        Section("Consistency", consistency_table(runs), REPORTED_NOTE, soft_rows=reported),
        Section("All measures", summary_table(results), MEASURES_NOTE, _interval_plots(runs)),
    ]
    if results.distances:
        sections.append(Section("Distances to real videos", distance_table(results), DISTANCE_NOTE))
    for other in others:
        title = f"{results.name} minus {other.name}, story by story"
        sections.append(Section(title, comparison_table(results, other), _comparison_note(results, other)))
    if any(column.truth_of for column in results.columns):
        title = "Learned scores against the truth"
        sections.append(Section(title, correlation_table(results), TRUTH_NOTE, _truth_plots(results)))
    if plot := _scatter(results, "visual", "semantic"):
        sections.append(Section("Stories", None, STORIES_NOTE, [plot]))
    if results.off:
        reasons = [list(pair) for pair in results.off.items()]
        sections.append(Section("Not measured", (["Measure", "Reason"], reasons), is_text=True))
    if results.faults:
        faults = [[fault.story, fault.stage, fault.fault] for fault in results.faults]
        sections.append(Section("Faults", (["Story", "Stage", "Fault"], faults), is_text=True))
    return sections


def _markdown(results: Results, sections: Sequence[Section]) -> str:
    parts = [f"# {results.name}: evaluation of {len(results.stories)} stories"]
    parts += [f"> **{note}**" for note in results.notes]
    for section in sections:
        if section.table:
            parts += [f"## {section.title}", markdown_table(*section.table), section.note]
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(results: Results, sections: Sequence[Section]) -> str:
    return render(
        "report.html",
        title=f"{results.name}: evaluation",
        name=results.name,
        num_stories=len(results.stories),
        num_scenes=sum(len(story.scenes) for story in results.stories),
        notes=results.notes,
        num_faults=len(results.faults),
        sections=sections,
        rankings=_rankings(results),
        every_story=_story_table(results),
        versions=", ".join(f"{name} {version}" for name, version in results.versions.items() if version),
    )


def _rankings(results: Results) -> list[dict]:
    """The best and the worst stories for the page; empty if no column ranks them."""
    column = _ranked_by(results)
    if column is None:
        return []
    key, title = column.key, column.title.lower()
    stories = sorted((s for s in results.stories if s.values.get(key) is not None), key=lambda s: -s.values[key])
    best = stories[: min(NUM_SHOWN, (len(stories) + 1) // 2)]
    worst = stories[len(best) :][-NUM_SHOWN:][::-1]
    ranked = {f"Best by {title}": best, f"Worst by {title}": worst}
    return [
        {"title": title, "stories": [_story(story, key) for story in chosen]}
        for title, chosen in ranked.items()
        if chosen
    ]


def _story(story: StoryResult, key: str) -> dict:
    """A story for the page: frames of each scene with its prompt, and the similarity of scenes."""
    scenes, fault = [], None
    try:
        reader = open_video(story.video)
        for (start, stop), prompt in zip(story.scenes, story.prompts):
            indices = np.linspace(start, stop - 1, FRAMES_PER_SCENE).round().astype(int).tolist()
            frames = [_thumbnail(frame) for frame in reader.read(indices).numpy()]
            scenes.append({"frames": frames, "prompt": prompt})
    except (OSError, ValueError, IndexError) as error:
        fault = str(error)  # the video may have been removed since; the scores are still valid
    matrix = story.details.get("consistency", {}).get("similarity")
    return {
        "title": story.title,
        "value": story.values[key],
        "scenes": scenes,
        "fault": fault,
        "similarity": matrix and heat_map(matrix, f"Similarity of scenes in {story.title}"),
    }


def _thumbnail(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    width = round(image.width * THUMB_HEIGHT / image.height)
    with io.BytesIO() as file:
        image.resize((width, THUMB_HEIGHT), Image.Resampling.LANCZOS).save(file, format="JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _ranked_by(results: Results) -> Column | None:
    """The column that ranks stories; None if there is none."""
    columns = sorted(results.columns, key=lambda column: column.key != "sequence")
    return next((column for column in columns if column.better == "higher" and results.values(column.key)), None)


def _story_table(results: Results) -> Table:
    rows = []
    for story in results.stories:
        values = [story.values.get(column.key) for column in results.columns]
        rows.append([story.title, *("–" if value is None else f"{value:.2f}" for value in values)])
    return ["Story", *(column.title for column in results.columns)], rows


def _scatter(results: Results, x_key: str, y_key: str) -> str:
    """One dot per story that has both values; empty without any."""
    titles = {column.key: column.title for column in results.columns}
    x, y = results.values(x_key), results.values(y_key)
    points = [(story.title, x[story.name], y[story.name]) for story in results.stories if story.name in x.keys() & y]
    return scatter_plot(points, titles[x_key], titles[y_key]) if points else ""


def _interval_plots(runs: Sequence[Results]) -> list[str]:
    """A plot of all runs over the first run's percentage measures; empty without any."""
    percent = [column for column in runs[0].columns if column.better and column.is_percentage]
    rows = [(column.title, [run.interval(column.key) for run in runs]) for column in percent]
    return _not_empty([interval_plot([row for row in rows if any(row[1])], [run.name for run in runs])])


def _truth_plots(results: Results) -> list[str]:
    """Plots of ground truth against the learned column that is meant to measure the same."""
    return _not_empty(
        [_scatter(results, column.key, column.truth_of) for column in results.columns if column.truth_of]
    )


def _not_empty(plots: Sequence[str]) -> list[str]:
    return [plot for plot in plots if plot]


def _title(column) -> str:
    return column.title + {"lower": " ↓", "higher": " ↑"}.get(column.better, "")


def _mean(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.2f}"
