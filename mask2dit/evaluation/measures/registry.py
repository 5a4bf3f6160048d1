"""Selects the measures that can run with the available weights."""

from collections.abc import Callable
from pathlib import Path

import torch

from mask2dit.config import parse_shard
from mask2dit.device import choose_device
from mask2dit.encoders.untrained import UNTRAINED, build_untrained_viclip
from mask2dit.engine.config import resolve_shard
from mask2dit.evaluation.config import INSTALL, EvaluationConfig
from mask2dit.evaluation.measures.base import Measure
from mask2dit.evaluation.measures.consistency import ConsistencyMeasure
from mask2dit.evaluation.measures.cuts import CutMeasure
from mask2dit.evaluation.measures.judge import JudgeMeasure
from mask2dit.evaluation.measures.quality import AestheticMeasure, FrameConsistencyMeasure
from mask2dit.evaluation.measures.storyworld import StoryWorldMeasure
from mask2dit.evaluation.measures.vbench import VBenchMeasure


def build_measure(config: EvaluationConfig, name: str) -> Measure:
    """The measure of this name, on the device of this process."""
    [measure], _ = build_measures(config, choose_device(config.device), only=name)
    return measure


def build_measures(
    config: EvaluationConfig, device: torch.device, only: str | None = None
) -> tuple[list[Measure], dict[str, str]]:
    """The measures that can run, and why the others cannot.

    Args:
        config: their weights and settings.
        device: the device of their models.
        only: the name of the one to build. None: all.

    Raises:
        ValueError: if weights exist but are damaged.
    """
    viclip, quality = config.viclip, config.quality
    if viclip.build_untrained and viclip.weights and Path(viclip.weights).name.startswith(UNTRAINED):
        build_untrained_viclip(viclip.weights)
    measures: list[Measure] = []
    off: dict[str, str] = {}

    def add(name: str, build: Callable[[], Measure], *needed: str | None) -> None:
        if only not in (None, name):
            return
        missing = [path for path in needed if path is None or not Path(path).exists()]
        if missing:
            off[name] = "not asked for" if missing[0] is None else f"put its weights at {missing[0]}"
            return
        try:
            measures.append(build())
        except FileNotFoundError as error:
            off[name] = str(error)
        except ModuleNotFoundError as error:
            off[name] = f"{error}: {INSTALL}"

    add("consistency", lambda: ConsistencyMeasure(viclip, device), viclip.weights)
    if config.detects_boundaries:
        off["cuts"] = "boundaries=detected takes the boundaries from the cuts themselves"
    else:
        add("cuts", lambda: CutMeasure(config.cuts))
    add("aesthetic", lambda: AestheticMeasure(quality, device), quality.clip, quality.aesthetic_head)
    for name, folder in (("subject_consistency", quality.dino), ("background_consistency", quality.background_clip)):
        add(name, lambda n=name, f=folder: FrameConsistencyMeasure(n, f, quality.num_frames, device), folder)
    # A folder per part of the work, since each run of VBench empties its own.
    index, count = parse_shard(resolve_shard(config))
    work = Path(config.output) / ("vbench" if count == 1 else f"vbench.{index}-of-{count}")
    add("vbench", lambda: VBenchMeasure(config.vbench, work), config.vbench.command)
    add("judge", lambda: JudgeMeasure(config.judge), *([None] if config.judge.base_url is None else []))
    add("storyworld", StoryWorldMeasure, *([] if config.storyworld else [None]))
    return measures, off
