"""Stored results of a run: one line per story in `results.jsonl`, everything else in `summary.json`."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mask2dit.evaluation.measures.base import Column
from mask2dit.files import read_json, read_lines, write_lines, write_text
from mask2dit.reporting.bootstrap import Interval, mean_interval


@dataclass(frozen=True, kw_only=True)
class StoryResult:
    """The measurements of a story."""

    name: str
    title: str
    prompts: list[str]
    video: str
    scenes: list[list[int]]
    """[start, stop] of each scene, in frames."""
    values: dict[str, float | None]
    """Values by column key."""
    details: dict[str, dict]
    """Details by measure."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The reason why a story could not be generated or scored."""

    story: str
    stage: str
    fault: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run, as the report shows them."""

    name: str
    stories: list[StoryResult]
    columns: list[Column]
    measured_by: dict[str, str]
    """Identity of the measure behind each column, by column key. Only columns with equal identities can be compared."""
    distances: dict[str, dict]
    """By extractor: the Fréchet and kernel distances, and the sizes of both sets."""
    off: dict[str, str]
    """Measures that did not run, with the reason."""
    faults: list[Fault]
    notes: list[str]
    """Warnings that the report shows before any number."""
    settings: dict
    versions: dict
    untrained: list[str] = field(default_factory=list)
    """Keys of columns without meaning, since random weights generated or scored the videos."""

    def values(self, key: str) -> dict[str, float]:
        """The values of one column by story name, without stories that lack it."""
        found = {story.name: story.values.get(key) for story in self.stories}
        return {name: value for name, value in found.items() if value is not None}

    def interval(self, key: str) -> Interval | None:
        """The mean of a column over stories with its 95% interval; None without a value."""
        values = list(self.values(key).values())
        return mean_interval(values) if values else None

    def write(self, folder: str | os.PathLike) -> None:
        """Writes `results.jsonl`, `summary.json` and `results.csv`."""
        folder = Path(folder)
        write_lines(folder / "results.jsonl", map(dataclasses.asdict, self.stories))
        summary = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "stories"}
        summary["columns"] = [dataclasses.asdict(column) for column in self.columns]
        summary["faults"] = [dataclasses.asdict(fault) for fault in self.faults]
        intervals = {column.key: self.interval(column.key) for column in self.columns}
        summary["means"] = {key: dataclasses.asdict(value) for key, value in intervals.items() if value}
        write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        with io.StringIO(newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["story", *(column.key for column in self.columns)])
            for story in self.stories:
                writer.writerow([story.name, *(story.values.get(column.key) for column in self.columns)])
            write_text(folder / "results.csv", file.getvalue())

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Results":
        """Reads what `write` wrote.

        Raises:
            FileNotFoundError, ValueError: if the folder does not hold the results of a run.
        """
        for name in ("summary.json", "results.jsonl"):
            if not (Path(folder) / name).is_file():
                raise FileNotFoundError(f"there is no {name} in {str(folder)!r}: evaluate that run first")
        path = Path(folder) / "summary.json"
        stories = read_lines(Path(folder) / "results.jsonl", lambda record: StoryResult(**record), grows=False)
        summary = read_json(path, remedy := "evaluate that run again")
        try:
            del summary["means"]
            summary["columns"] = [Column(**column) for column in summary["columns"]]
            summary["faults"] = [Fault(**fault) for fault in summary["faults"]]
            return cls(stories=stories, **summary)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): {remedy}") from error


def shared_stories(runs: Sequence[Results]) -> list[str]:
    """The names of the stories that all runs have with the same prompts, in the first run's order."""
    first, *others = [{story.name: story.prompts for story in run.stories} for run in runs]
    return [name for name, prompts in first.items() if all(other.get(name) == prompts for other in others)]
