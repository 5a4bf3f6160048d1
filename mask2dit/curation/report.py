"""The funnel of entries kept and removed per stage, the distribution of similarity, and the card of a dataset."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.verify import Verified
from mask2dit.curation.write import Clip
from mask2dit.encoders.untrained import UNTRAINED
from mask2dit.files import write_text
from mask2dit.provenance import git_commit, versions
from mask2dit.reporting.pages import render
from mask2dit.reporting.plots import histogram
from mask2dit.reporting.tables import markdown_table, text_table

UNITS = {  # the input of each stage
    "probe": "films",
    "split": "films, into scenes",
    "write": "scenes, into clips",
    "score": "clips",
    "filter": "clips",
    "embed": "clips",
    "duplicates": "clips",
    "group": "films, into windows",
    "single": "clips outside groups",
    "caption": "groups and single clips",
    "verify": "captions",
    "export": "captions",
}
PAPER_THRESHOLDS = (0.0, 0.6, 0.7, 0.8)


def funnel_table(funnel: Mapping[str, dict], table: Callable[[Sequence[str], Sequence], str] = text_table) -> str:
    """The funnel: for each stage, the numbers of entries that went in, were kept, and were removed by each rule.

    Args:
        funnel: counts by stage.
        table: `text_table` or `markdown_table`.
    """
    rows = []
    for stage, counts in funnel.items():
        removed = [f"{rule} {count}" for rule, count in counts["dropped"].items()]
        removed += [f"(not done yet: {counts['not done']})"] if counts["not done"] else []
        rows.append((stage, UNITS[stage], str(counts["in"]), str(counts["kept"]), ", ".join(removed) or "-"))
    return table(("stage", "of", "in", "kept", "removed by rule"), rows)


def similarity_plot(cosines: Sequence[float], threshold: float, ceiling: float) -> str:
    """A histogram of the cosines of neighbouring clips, with the thresholds of the run and of the paper's ablation."""
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
    """Writes `card.md` and its plots next to the manifests."""
    seconds = [clip.num_frames / clip.fps for clip in clips]
    plots = {"clip_seconds.svg": histogram(seconds, "seconds per clip", {})}
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
    card = render(
        "card.md",
        notes=notes,
        version=versions()["mask2dit"],
        commit=git_commit(),
        manifests=markdown_table(("manifest", "rows"), [(name, str(count)) for name, count in rows.items()]),
        seconds=seconds,
        median=statistics.median(seconds),
        config=config,
        funnel=funnel_table(funnel, markdown_table),
        num_requests=len(captions),
        models=sorted({f"{entry.model}, prompt {entry.prompt_version}" for entry in captions}),
        input_tokens=sum(entry.input_tokens for entry in captions),
        output_tokens=sum(entry.output_tokens for entry in captions),
        num_repeated=sum(entry.attempts > 1 for entry in captions),
        num_flagged=sum(min(entry.cosines) < config.verify.flag_below for entry in verified),
        plots=plots,
        settings=OmegaConf.to_yaml(dataclasses.asdict(config)).rstrip(),
    )
    write_text(target / "card.md", card)
    return target / "card.md"
