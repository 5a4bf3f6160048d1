"""Similarity of captions and their clips, by ViCLIP's cosine. The review page flags low values; a person decides."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mask2dit.curation.caption import Captions
from mask2dit.curation.embed import Embedder, Features, read_features
from mask2dit.curation.store import Entry
from mask2dit.encoders.config import ViCLIPConfig


@dataclass(frozen=True, kw_only=True)
class Verified(Entry):
    """Similarity for the captions with the same id."""

    cosines: list[float]
    """One cosine per clip: the mean over the chunks of its caption."""


def verify(
    captions: Iterable[Captions],
    features: Mapping[str, Features],
    folder: Path,
    config: ViCLIPConfig,
    device: torch.device,
) -> Iterator:
    """Compares captions with their clips."""
    embedder = Embedder(config, device)
    for entry in captions:
        videos = read_features([features[name] for name in entry.clips], folder)
        cosines = [
            round(float(np.mean(embedder.text(caption) @ video)), 4) for caption, video in zip(entry.captions, videos)
        ]
        yield entry, [Verified(id=entry.id, source=entry.source, cosines=cosines)]
