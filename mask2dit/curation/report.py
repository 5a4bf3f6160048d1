"""What came in and what was removed, the distribution of similarity, and the card of a data set."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.verify import Verified
from mask2dit.curation.write import Clip
from mask2dit.evaluation.untrained import UNTRAINED
from mask2dit.files import write_text
from mask2dit.provenance import git_commit, versions

UNITS = {  # what goes into each stage
    "probe": "films",
    "split": "films, into scenes",
    "write": "scenes, into clips",
    "score": "clips",
    "filter": "clips",
    "embed": "clips",
    "group": "films, into windows",
    "single": "clips outside groups",
    "caption": "groups and single clips",
    "verify": "captions",
    "export": "captions",
}
PAPER_THRESHOLDS = (0.0, 0.6, 0.7, 0.8)
INK, SOFT, RULE, BAR, LINE = "#202124", "#5f6368", "#dadce0", "#1a66c2", "#b3261e"
BAR_COUNT = 40


def funnel_table(funnel: Mapping[str, dict]) -> str:
    """The funnel in columns: what went in, what was kept, and what each rule removed."""
    lines = [("stage", "of", "in", "kept", "removed by rule")]
    for stage, counts in funnel.items():
        removed = [f"{rule} {count}" for rule, count in counts["dropped"].items()]
        removed += [f"(not done yet: {counts['not done']})"] if counts["not done"] else []
        lines.append((stage, UNITS[stage], str(counts["in"]), str(counts["kept"]), ", ".join(removed) or "-"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def histogram(
    values: Sequence[float], title: str, marks: Mapping[str, float], guides: Mapping[str, float] | None = None
) -> str:
    """A histogram as SVG.

    Args:
        values: what is counted, at least one.
        title: of the axis.
        marks: values to draw as lines, by their labels.
        guides: the same, less strongly: dashed.
    """
    width, height = 760, 300
    lines = [(value, label, LINE, "") for label, value in marks.items()]
    lines += [(value, label, SOFT, " stroke-dasharray='4 3'") for label, value in (guides or {}).items()]
    places = [*values, *(value for value, *_ in lines)]
    low, high = min(places), max(places)
    span = (high - low) or 1.0
    low, high = low - 0.02 * span, high + 0.02 * span
    step = (high - low) / BAR_COUNT
    counts = [0] * BAR_COUNT
    for value in values:
        counts[min(int((value - low) / step), BAR_COUNT - 1)] += 1
    left, right, top, bottom = 50, 20, 20 + 15 * len(lines), 46
    tallest = max(counts) or 1

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    def y(count: float) -> float:
        return height - bottom - count / tallest * (height - top - bottom)

    parts = [
        f"<line x1='{left}' x2='{width - right}' y1='{y(0)}' y2='{y(0)}' stroke='{RULE}'/>",
        f"<text x='{left - 8}' y='{y(tallest) + 4:.1f}' text-anchor='end' fill='{SOFT}'>{tallest}</text>",
        f"<text x='{left - 8}' y='{y(0) + 4:.1f}' text-anchor='end' fill='{SOFT}'>0</text>",
        f"<text x='{width / 2}' y='{height - 6}' text-anchor='middle' fill='{INK}'>{title}, {len(values)} values</text>",
    ]
    for i, count in enumerate(counts):
        if count:
            begin, end = low + i * step, low + (i + 1) * step
            parts.append(
                f"<rect x='{x(begin):.1f}' y='{y(count):.1f}' width='{x(end) - x(begin) - 1:.1f}' "
                f"height='{y(0) - y(count):.1f}' fill='{BAR}'><title>{begin:.3f} to {end:.3f}: {count}</title></rect>"
            )
    for value in _ticks(low, high):
        parts.append(
            f"<text x='{x(value):.1f}' y='{y(0) + 16:.1f}' text-anchor='middle' fill='{SOFT}'>{value:g}</text>"
        )
    # Each label in a line of its own, the rightmost value's on top, so that no label is crossed by the line of another.
    for i, (value, label, colour, dashes) in enumerate(sorted(lines, reverse=True)):
        side, shift = ("end", -5) if x(value) > 150 else ("start", 5)
        parts.append(
            f"<line x1='{x(value):.1f}' x2='{x(value):.1f}' y1='{8 + 15 * i}' y2='{y(0)}' stroke='{colour}'{dashes}/>"
            f"<text x='{x(value) + shift:.1f}' y='{18 + 15 * i}' text-anchor='{side}' fill='{colour}'>{label}</text>"
        )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' font-family='system-ui, sans-serif' font-size='12'>"
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>{''.join(parts)}</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    return [round(step * i, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def similarity_plot(cosines: Sequence[float], threshold: float, ceiling: float) -> str:
    """The distribution of neighbouring clips' cosines, with the thresholds of the run and of the paper's ablation."""
    marks = {f"threshold {threshold:g}": threshold, f"ceiling {ceiling:g}": ceiling}
    guides = {f"paper's {value:g}": value for value in PAPER_THRESHOLDS if value != threshold}
    return histogram(cosines, "cosine of neighbouring clips", marks, guides)


def write_card(
    target: Path,
    config: CurationConfig,
    funnel: Mapping[str, dict],
    rows: Mapping[str, int],
    clips: Sequence[Clip],
    captions: Sequence[Captions],
    verified: Sequence[Verified],
    cosines: Sequence[float],
) -> Path:
    """Writes `card.md` with its plots beside the manifests."""
    seconds = [clip.num_frames / clip.fps for clip in clips]
    plots = {"clip_seconds.svg": histogram(seconds, "seconds of a clip", {})}
    if cosines:
        plots["similarity.svg"] = similarity_plot(cosines, config.group.threshold, config.group.ceiling)
    if verified:
        of_captions = [cosine for entry in verified for cosine in entry.cosines]
        flag_below = {f"flagged below {config.verify.flag_below:g}": config.verify.flag_below}
        plots["caption_similarity.svg"] = histogram(of_captions, "cosine of caption and clip", flag_below)
    for name, plot in plots.items():
        write_text(target / name, plot)

    notes = []
    if Path(config.embed.viclip.weights).name.startswith(UNTRAINED):
        notes.append("ViCLIP had random weights: similarities mean nothing.")
    if config.caption.backend == "stand_in":
        notes.append("Captions come from the stand-in, which never saw the pictures.")
    models = sorted({f"{entry.model}, prompt {entry.prompt_version}" for entry in captions})
    tokens = [sum(getattr(entry, name) for entry in captions) for name in ("input_tokens", "output_tokens")]
    lines = [
        "# Card of this data set",
        "",
        *(f"**{note}**" for note in notes),
        *([""] if notes else []),
        f"Made by `python -m mask2dit.curation` of mask2dit {versions()['mask2dit']}, commit {git_commit() or 'unknown'}.",
        "",
        "## Manifests",
        "",
        "| manifest | rows |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in rows.items()),
        "",
        f"{len(clips)} clips passed the filters, {sum(seconds) / 3600:.2f} hours, {statistics.median(seconds):.1f} s at the "
        f"median. Films are in one part only; validation takes a share of {config.export.validation_share:g} of them by "
        "a hash of their names.",
        "",
        "## What was removed",
        "",
        "| stage | of | in | kept | removed by rule |",
        "|---|---|---|---|---|",
        *(
            f"| {stage} | {UNITS[stage]} | {counts['in']} | {counts['kept']} | "
            f"{', '.join(f'{rule} {count}' for rule, count in counts['dropped'].items()) or '-'} |"
            for stage, counts in funnel.items()
        ),
        "",
        "## Captions",
        "",
        f"{len(captions)} requests were answered by {'; '.join(models)}: {tokens[0]} tokens in, {tokens[1]} out; "
        f"{sum(entry.attempts > 1 for entry in captions)} needed more than one attempt, "
        f"{sum(min(entry.cosines) < config.verify.flag_below for entry in verified)} are flagged.",
        "",
        *(f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})\n" for name in plots),
        "## Settings",
        "",
        "```yaml",
        OmegaConf.to_yaml(dataclasses.asdict(config)).rstrip(),
        "```",
    ]
    write_text(target / "card.md", "\n".join(lines) + "\n")
    return target / "card.md"
