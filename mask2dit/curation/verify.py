"""Whether captions fit their clips, by ViCLIP's cosine. It flags; a person decides."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.embed import Embedder, Features, read_features
from mask2dit.curation.store import Entry


@dataclass(frozen=True, kw_only=True)
class Verified(Entry):
    """Of captions, which have the same id."""

    cosines: list[float]
    """One a clip: the mean over the windows of text that its caption takes."""
    is_flagged: bool
    """Whether one is low."""


def verify(
    captions: Iterable[Captions],
    features: Mapping[str, Features],
    folder: Path,
    config: CurationConfig,
    device: torch.device,
) -> Iterator:
    """Compares captions with their clips."""
    embedder = Embedder(config.embed.viclip, device)
    for entry in captions:
        videos = read_features([features[name] for name in entry.clips], folder)
        cosines = [
            round(float(np.mean(embedder.text(caption) @ video)), 4) for caption, video in zip(entry.captions, videos)
        ]
        is_flagged = min(cosines) < config.verify.flag_below
        yield entry, [Verified(id=entry.id, source=entry.source, cosines=cosines, is_flagged=is_flagged)]
