"""What came in and what was removed, the distribution of similarity, and the card of a data set."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.verify import Verified
from mask2dit.curation.write import Clip
from mask2dit.encoders.untrained import UNTRAINED
from mask2dit.files import write_text
from mask2dit.provenance import git_commit, versions
from mask2dit.reporting.svg import histogram

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


def funnel_table(funnel: Mapping[str, dict]) -> str:
    """The funnel in columns: what went in, what was kept, and what each rule removed."""
    lines = [("stage", "of", "in", "kept", "removed by rule")]
    for stage, counts in funnel.items():
        removed = [f"{rule} {count}" for rule, count in counts["dropped"].items()]
        removed += [f"(not done yet: {counts['not done']})"] if counts["not done"] else []
        lines.append((stage, UNITS[stage], str(counts["in"]), str(counts["kept"]), ", ".join(removed) or "-"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


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
