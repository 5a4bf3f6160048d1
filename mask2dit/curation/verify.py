"""Similarity of captions and their clips, by ViCLIP's cosine. The review page flags low values; a person decides."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mask2dit.curation.caption import Captions
from mask2dit.curation.embed import Embedder, Features, read_features
from mask2dit.curation.store import Entry


@dataclass(frozen=True, kw_only=True)
class Verified(Entry):
    """Similarity for the captions with the same id."""

    cosines: list[float]
    """One cosine per clip: the mean over the chunks of its caption."""


@dataclass(frozen=True, kw_only=True)
class CaptionedClips(Entry):
    """Captions with the features of their clips, in order. Has the id and the key of the captions."""

    captions: tuple[str, ...]
    features: tuple[Features, ...]


def with_features(captions: Sequence[Captions], features: Mapping[str, Features]) -> list[CaptionedClips]:
    """Adds to captions the features of their clips, so that a worker needs no others."""
    return [
        CaptionedClips(
            id=entry.id,
            source=entry.source,
            key=entry.key,
            captions=tuple(entry.captions),
            features=tuple(features[name] for name in entry.clips),
        )
        for entry in captions
    ]


def verify(captioned: Iterable[CaptionedClips], embedder: Embedder, folder: Path) -> Iterator:
    """Compares captions with their clips."""
    for entry in captioned:
        videos = read_features(entry.features, folder)
        cosines = [
            round(float(np.mean(embedder.text(caption) @ video)), 4) for caption, video in zip(entry.captions, videos)
        ]
        yield entry, [Verified(id=entry.id, source=entry.source, cosines=cosines)]
