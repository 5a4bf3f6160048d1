"""Measures the stories of trials and rebuilds the tables and pictures of a page: `python -m mask2dit.storyworld.report`.

Measurements are kept next to the videos, and their summaries in the page's folder, so that some of the trials suffice to
rebuild the page.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mask2dit.command import run_command
from mask2dit.files import read_json, write_text
from mask2dit.reporting.bootstrap import mean_interval
from mask2dit.reporting.plots import line_plot
from mask2dit.reporting.tables import markdown_table, replace_part
from mask2dit.storyworld.measure import (
    OF_ACTORS,
    UNRELATED,
    SceneMeasurement,
    code_identity,
    differences,
    measure_scene,
    visual_consistency,
)
from mask2dit.storyworld.observe import find_cuts
from mask2dit.storyworld.trial import (
    RECORD,
    TASKS,
    TrialConfig,
    read_record,
    returning_actors,
    story_of,
    story_seeds,
    video_path,
)
from mask2dit.storyworld.world import MAX_ACTORS, caption, describe
from mask2dit.video.reading import open_video
from mask2dit.video.writing import contact_sheet, write_image

logger = logging.getLogger(__name__)

MEASUREMENTS = "measurements.json"
KINDS = ("cast", "colour", "shape", "accessory", "action", "joint", "setting")
NOT_RUN = "not run"
SHOWN = 3  # stories per contact sheet


@dataclass(frozen=True)
class Row:
    """A run of an ablation with the paper's number for it."""

    label: str
    run: str
    """Folder of the run among the ablations."""
    paper: str


ABLATIONS = {
    "variants": (
        Row("v1: scenes isolated", "v1", "58.09 / 24.69"),
        Row("v2: video sees video (Mask²DiT)", "v2", "68.45 / 23.82"),
        Row("v3: and text sees text", "v3", "77.56 / 23.47"),
        Row("v4: v2, and text sees all video", "v4", "93.43 / 20.73"),
        Row("v5: full attention", "v5", "90.72 / 20.60"),
    ),
    "stages": (
        Row("pre-training only", "pretraining_only", "49.04"),
        Row("fine-tuning only", "tuning_only", "73.22"),
        Row("both", "v2", "73.73"),
    ),
    "thresholds": (
        Row("0.0", "threshold_0.0", "63.94"),
        Row("0.6", "threshold_0.6", "66.46"),
        Row("0.7", "threshold_0.7", "67.71"),
        Row("0.8", "threshold_0.8", "73.22"),
    ),
    "conditional": (Row("p = 0", "unconditional", "-"), Row("p = 0.5", "v2", "-")),
}
SPLITS = (("new stories", "train"), ("unseen combinations", "held_out"))
TRIALS = (
    ("all scenes at once", "fixed"),
    ("the same with v1, scenes isolated", "fixed_v1"),
    ("third scene from two real ones", "extension"),
    ("the same, with context guidance", "extension_context"),
    ("third scene without them", "no_context"),
    ("middle scene from its neighbours", "middle"),
    ("the same, with context guidance", "middle_context"),
    ("scenes 3 to 8, one after another", "sliding"),
    ("the same, with context guidance", "sliding_context"),
)
CONTEXT_TRIALS = (
    ("a return after two scenes, context: last", "return_last"),
    ("a return after two scenes, context: anchor", "return_anchor"),
    ("a return after two scenes, context: cast", "return_cast"),
    ("a return after two scenes, no context", "return_no_context"),
    ("twelve scenes, context: last", "drift_last"),
    ("twelve scenes, context: anchor", "drift_anchor"),
    ("twelve scenes, context: cast", "drift_cast"),
)


@dataclass(kw_only=True)
class ReportConfig:
    """The folders of the trials, and the page."""

    trials: str = "outputs/storyworld/trials"
    """Folder of the trials: one folder per split and in it one per trial, named as in `SPLITS` and `TRIALS`. Trials in
    `steps` compare samplers, those in `contexts` the choice of context, named as in `CONTEXT_TRIALS`."""
    ablations: str = "outputs/storyworld/ablations"
    """Folder of the ablations: one folder per run, named as in `ABLATIONS`, with its trials in `trials/fixed` and
    `trials/extension`."""
    page: str = "docs/storyworld.md"
    """Page whose tables are written between `<!-- begin NAME -->` and `<!-- end NAME -->`; pictures and summaries go
    into the folder of the same name."""


def write_report(config: ReportConfig) -> None:
    """Measures new stories and rebuilds the tables, the plot and the contact sheets.

    Raises:
        FileNotFoundError: if there is no page.
        ValueError: if the page lacks the markers of a table.
    """
    page = Path(config.page)
    if not page.is_file():
        raise FileNotFoundError(f"there is no page {config.page!r} to write the tables into")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    summaries_path = folder / "results.json"
    summaries = read_json(summaries_path, "restore it from the repository") if summaries_path.is_file() else {}
    measured: dict[Path, list[dict]] = {}
    for root in (Path(config.trials), Path(config.ablations)):
        for record in sorted(root.rglob(RECORD)):
            name = f"{root.name}/{record.parent.relative_to(root)}"
            stories = measured[record.parent] = measure_trial(record.parent)
            if stories:
                summaries[name] = summarise(read_record(record.parent), stories)
                logger.info("%s: %d stories", name, len(stories))
    write_text(summaries_path, json.dumps(summaries, indent=1, sort_keys=True) + "\n")

    text = page.read_text(encoding="utf-8")
    text = replace_part(text, "trials", trials_table(summaries))
    text = replace_part(text, "kinds", kinds_table(summaries))
    text = replace_part(text, "casts", casts_table(summaries))
    text = replace_part(text, "steps", steps_table(summaries))
    text = replace_part(text, "contexts", contexts_table(summaries))
    for name, rows in ABLATIONS.items():
        text = replace_part(text, name, ablation_table(summaries, rows))
    sliding = {label: summaries.get(f"trials/{split}/sliding") for label, split in SPLITS}
    if any(sliding.values()):
        write_text(folder / "sliding.svg", _sliding_plot(sliding))
    fixed = Path(config.trials) / "held_out/fixed"
    if measured.get(fixed):
        ranked = sorted(measured[fixed], key=lambda story: (np.mean(story["right"]), story["consistency"]))
        write_image(folder / "good.png", _sheet(fixed, [story["seed"] for story in ranked[::-1][:SHOWN]]))
        write_image(folder / "failed.png", _sheet(fixed, [story["seed"] for story in ranked[:SHOWN]]))
    write_text(page, replace_part(text, "pictures", _pictures(folder)))


def measure_trial(folder: Path) -> list[dict]:
    """Measurements of all stories of a trial, as from `measure_video`, in the order of their seeds."""
    config = read_record(folder)
    code = code_identity()
    path = folder / MEASUREMENTS
    kept = read_json(path, "remove it to measure again") if path.is_file() else {"code": code, "stories": {}}
    stories = kept["stories"] if kept["code"] == code else {}
    seeds = [seed for seed in story_seeds(config) if video_path(folder, seed).is_file()]
    missing = [seed for seed in seeds if str(seed) not in stories]
    for seed in tqdm(missing, desc=str(folder), unit="story", disable=None):
        reader = open_video(video_path(folder, seed))
        stories[str(seed)] = measure_video(config, seed, reader.read(range(reader.num_frames)).numpy())
    if missing:
        write_text(path, json.dumps({"code": code, "stories": stories}))
    return [stories[str(seed)] for seed in seeds]


def measure_video(config: TrialConfig, seed: int, video: np.ndarray) -> dict:
    """Measures the generated scenes of a story, and the pairs of scenes with at least one of them.

    Args:
        config: settings of the trial.
        seed: seed of the story.
        video: `uint8 (S*frames, H, W, 3)`.

    Returns:
        "seed"; "right": for each generated scene, True if all of it is right; "kinds": the same for each attribute, by kind;
        "consistency" and its "groups"; "to_first": the consistency of each later scene with the first; "cuts": True if cuts
        are where scenes begin and nowhere else; "returned": the consistency of the actors that return, or None.
    """
    task = TASKS[config.task]
    story = story_of(config, seed)
    parts = np.split(video, task.num_scenes)
    scenes = [measure_scene(part, describe(story, k)) for k, part in enumerate(parts)]
    pairs = [pair for pair in combinations(range(task.num_scenes), 2) if set(pair) & set(task.generated)]
    consistency = visual_consistency(scenes, pairs)
    kinds: dict[str, list[bool]] = {}
    for k in task.generated:
        for kind, values in scenes[k].right.items():
            kinds.setdefault(kind, []).extend(values)
    boundaries = tuple(config.num_frames * k for k in range(1, task.num_scenes))
    return {
        "seed": seed,
        "right": [scenes[k].all_right for k in task.generated],
        "kinds": kinds,
        "consistency": consistency.overall,
        "groups": consistency.by_group,
        "to_first": [visual_consistency(scenes, [(0, k)]).overall for k in range(1, task.num_scenes)],
        "cuts": find_cuts(video) == boundaries,
        "returned": _consistency_of_returned(scenes, returning_actors(story)) if task.returns else None,
    }


def _consistency_of_returned(scenes: Sequence[SceneMeasurement], returned: Sequence[int]) -> float:
    """The consistency in hue and size between the first scene and the last of the actors with these indices."""
    first, last = scenes[0], scenes[-1]
    numbers = sorted(first.identity["hue"].keys() & last.identity["hue"].keys())
    found = differences(first, last)
    places = [numbers.index(k + 1) for k in returned]
    return float(np.mean([1 - found[part][place] / UNRELATED[part] for part in OF_ACTORS for place in places]))


def summarise(config: TrialConfig, stories: Sequence[dict]) -> dict:
    """Means over stories, some with 95% bootstrap intervals over stories, and the settings of the trial."""
    kinds = {kind: [value for story in stories for value in story["kinds"].get(kind, ())] for kind in KINDS}
    return {
        "model": config.model,
        "mask_variant": config.mask_variant,
        "task": config.task,
        "split": config.split,
        "range": config.stories,
        "seed": config.seed,
        "sampler": config.sampler,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "context_guidance": config.context_guidance,
        "stories": len(stories),
        "attributes": _interval([np.mean(list(chain(*story["kinds"].values()))) for story in stories]),
        "right": _interval([np.mean(story["right"]) for story in stories]),
        "last_right": _interval([story["right"][-1] for story in stories]),
        "consistency": _interval([story["consistency"] for story in stories]),
        "first_to_last": _interval([story["to_first"][-1] for story in stories]),
        "cuts": float(np.mean([story["cuts"] for story in stories])),
        "returned": _interval([story["returned"] for story in stories]) if TASKS[config.task].returns else None,
        "kinds": {kind: float(np.mean(values)) for kind, values in kinds.items() if values},
        "right_by_cast": _right_by_cast(config, stories),
        "right_by_scene": np.mean([story["right"] for story in stories], axis=0).tolist(),
        "to_first": np.mean([story["to_first"] for story in stories], axis=0).tolist(),
    }


def _right_by_cast(config: TrialConfig, stories: Sequence[dict]) -> dict[str, list]:
    """The share of scenes that are all right with its interval, and the number of stories, by the actors of the story."""
    by_cast: dict[str, list[float]] = {}
    for story in stories:
        by_cast.setdefault(str(len(story_of(config, story["seed"]).actors)), []).append(np.mean(story["right"]))
    return {count: [*_interval(shares), len(shares)] for count, shares in by_cast.items()}


def trials_table(summaries: dict) -> str:
    """Results by task and split, in Markdown."""
    measures = (
        "split",
        "stories",
        "steps",
        "scenes all right",
        "last scene all right",
        "visual consistency",
        "first to last",
        "cuts right",
    )
    rows = []
    for (label, name), (split, key) in product(TRIALS, SPLITS):
        found = summaries.get(f"trials/{key}/{name}")
        columns = [NOT_RUN] * 7
        if found:
            columns = [
                f"{found['stories']} {found['range']}",
                f"{found['num_inference_steps']} {found['sampler']}",
                _percent(found["right"]),
                _percent(found["last_right"]),
                _number(found["consistency"]),
                _number(found["first_to_last"]),
                f"{100 * found['cuts']:.0f}%",
            ]
        rows.append([label, split, *columns])
    return markdown_table(["task", *measures], rows)


def steps_table(summaries: dict) -> str:
    """Results by sampler, number of steps and guidance, in Markdown."""
    found = [summary for name, summary in summaries.items() if name.startswith("trials/steps/")]
    order = ("sampler", "num_inference_steps", "guidance_scale")
    rows = [
        [
            of["sampler"],
            str(of["num_inference_steps"]),
            f"{of['guidance_scale']:g}"
            + (" in {} to {}".format(*interval) if (interval := of["guidance_interval"]) else ""),
            f"{of['stories']} {of['range']}",
            _percent(of["right"]),
            _number(of["consistency"]),
        ]
        for of in sorted(found, key=lambda of: ([of[key] for key in order], of["guidance_interval"] or []))
    ]
    return markdown_table(["sampler", "steps", "guidance", "stories", "scenes all right", "visual consistency"], rows)


def kinds_table(summaries: dict) -> str:
    """Share of captioned attributes that are right, by task, split and kind, in Markdown."""
    rows = []
    for (label, name), (split, key) in product(TRIALS, SPLITS):
        kinds = summaries.get(f"trials/{key}/{name}", {}).get("kinds", {})
        columns = [f"{100 * kinds[kind]:.1f}%" if kind in kinds else NOT_RUN for kind in KINDS]
        rows.append([label, split, *columns])
    return markdown_table(["task", "split", *KINDS], rows)


def casts_table(summaries: dict) -> str:
    """Share of scenes all right, by task, split and number of actors in the story, in Markdown."""
    rows = []
    for (label, name), (split, key) in product(TRIALS, SPLITS):
        found = summaries.get(f"trials/{key}/{name}", {}).get("right_by_cast", {})
        columns = [NOT_RUN] * MAX_ACTORS
        for count, (*interval, stories) in found.items():
            columns[int(count) - 1] = f"{_percent(interval)}, {stories} stories"
        rows.append([label, split, *columns])
    return markdown_table(["task", "split", "one actor", "two actors", "three actors"], rows)


def contexts_table(summaries: dict) -> str:
    """Results of long stories by the choice of their context, in Markdown."""
    rows = []
    for label, name in CONTEXT_TRIALS:
        found = summaries.get(f"trials/contexts/{name}")
        columns = [NOT_RUN] * 5
        if found:
            returned = found["returned"]
            columns = [
                f"{found['stories']} {found['range']}",
                _percent(found["right"]),
                _percent(found["last_right"]),
                _number(found["first_to_last"]),
                _number(returned) if returned else "",
            ]
        rows.append([label, *columns])
    measures = ("scenes all right", "last scene all right", "first to last", "actor that returns to first")
    return markdown_table(["stories with", "stories", *measures], rows)


def ablation_table(summaries: dict, rows: Sequence[Row]) -> str:
    """Results of an ablation's runs, in Markdown."""
    measures = ("attributes right", "scenes all right", "visual consistency")
    heads = ["", f"all at once: {measures[0]}", *measures[1:], f"extension: {measures[0]}", *measures[1:], "paper"]
    lines = []
    for row in rows:
        columns = []
        for task in ("fixed", "extension"):
            found = summaries.get(f"ablations/{row.run}/trials/{task}")
            if found:
                columns += [_percent(found["attributes"]), _percent(found["right"]), _number(found["consistency"])]
            else:
                columns += [NOT_RUN] * len(measures)
        lines.append([row.label, *columns, row.paper])
    return markdown_table(heads, lines)


def _interval(values: Sequence[float]) -> list[float]:
    interval = mean_interval([float(value) for value in values])
    return [interval.value, interval.low, interval.high]


def _percent(interval: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.0f}% ({low:.0f} to {high:.0f})"


def _number(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _pictures(folder: Path) -> str:
    """Links to the pictures in Markdown, with a note in place of each missing one."""
    captions = {"good.png": "The best stories", "failed.png": "The worst stories", "sliding.svg": "A longer story"}
    return "\n\n".join(
        f"![{text}]({folder.name}/{name})" if (folder / name).is_file() else f"{text}: {NOT_RUN}"
        for name, text in captions.items()
    )


def _sliding_plot(summaries: dict[str, dict | None]) -> str:
    """A plot over the number of the scene, from 1; `summaries` are keyed by the label of their split."""
    lines = {}
    for label, summary in summaries.items():
        if summary:
            consistency, right = summary["to_first"], summary["right_by_scene"]
            lines[f"{label}: visual consistency with scene 1"] = list(enumerate(consistency, 2))
            lines[f"{label}: share of scenes all right"] = list(enumerate(right, len(consistency) + 2 - len(right)))
    return line_plot(lines, "scene", "")


def _sheet(folder: Path, seeds: Sequence[int]):
    """A contact sheet with one row per scene, story after story."""
    config = read_record(folder)
    count = TASKS[config.task].num_scenes
    scenes, texts = [], []
    for seed in seeds:
        reader = open_video(video_path(folder, seed))
        scenes += np.split(reader.read(range(reader.num_frames)).numpy(), count)
        texts += [caption(story_of(config, seed), k) for k in range(count)]
    return contact_sheet(scenes, texts, columns=5, thumb_width=128)


if __name__ == "__main__":
    sys.exit(run_command(ReportConfig, "mask2dit.storyworld.report:write_report", None, sys.argv[1:]))
