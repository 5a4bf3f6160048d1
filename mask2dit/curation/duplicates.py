"""Near-identical clips of different films: re-uploads, other resolutions, excerpts such as trailers. One of each is kept.

Each clip has prints of a few frames: tiny pictures without their mean brightness and contrast, which survive encoding,
scaling and small changes of brightness. An index over all prints finds clips that share a frame; such pairs are then compared
frame by frame, and by their ViCLIP features.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mask2dit.curation.config import DuplicatesConfig
from mask2dit.curation.embed import Features, read_features, read_prints
from mask2dit.curation.store import Dropped
from mask2dit.curation.write import Clip
from mask2dit.optional import import_optional

# Up to so many prints are compared one by one; more are searched in clusters.
EXACT_PRINTS = 50_000
PRINTS_PER_CLUSTER = 500
CLUSTERS_SEARCHED = 16
NEIGHBOURS = 64  # nearest prints of each print that are looked at
QUERIES_AT_ONCE = 8192


def find_twins(
    features: Sequence[Features], clips: Mapping[str, Clip], folder: Path, config: DuplicatesConfig
) -> dict[tuple[str, str], float]:
    """Pairs of near-identical clips of different films, by their ids, with the mean cosine of matched prints.

    Two clips are twins if at least `config.min_share` of the prints of the shorter one have a cosine of at least
    `config.threshold` with a print of the other, and their ViCLIP features one of at least `config.min_cosine`.
    """
    if len(features) < 2:
        return {}
    prints, vectors = read_prints(features, folder).astype(np.float32), read_features(features, folder)
    sources = [clips[entry.id].source for entry in features]
    found = {}
    for i, j in sorted(_candidates(prints, config.threshold)):
        if sources[i] == sources[j] or vectors[i] @ vectors[j] < config.min_cosine:
            continue
        short, long = sorted((i, j), key=lambda k: clips[features[k].id].num_frames / clips[features[k].id].fps)
        share, cosine = matched_share(prints[short], prints[long], config.threshold)
        if share >= config.min_share:
            found[features[i].id, features[j].id] = round(cosine, 4)
    return found


def matched_share(short: np.ndarray, long: np.ndarray, threshold: float) -> tuple[float, float]:
    """The share of a clip's frames that another clip shows too, and the mean cosine of the nearest frames.

    Args:
        short, long: prints (F, D), in float32.
        threshold: minimum cosine of the same frame.
    """
    shown = short[short.any(axis=1)]  # without blank frames
    if not len(shown):
        return 0.0, 0.0
    best = (shown @ long.T).max(axis=1)
    return float((best >= threshold).mean()), float(best.mean())


def drop_duplicates(
    features: Sequence[Features], clips: Mapping[str, Clip], twins: Mapping[tuple[str, str], float]
) -> list[Features | Dropped]:
    """Replaces all twins but one by `Dropped`, which names it: the one with the largest picture, then the longest."""
    family = _families([(a, b) for a, b in twins])
    members: dict[str, list[str]] = {}
    for name, root in family.items():
        members.setdefault(root, []).append(name)
    best = {
        root: min(names, key=lambda n: (-min(clips[n].width, clips[n].height), -clips[n].num_frames, n))
        for root, names in members.items()
    }
    results: list[Features | Dropped] = []
    for entry in features:
        twin = best[family[entry.id]] if entry.id in family else entry.id
        if twin == entry.id:
            results.append(entry)
            continue
        cosine = twins.get((entry.id, twin), twins.get((twin, entry.id)))
        why = f"twin of {twin}" + (", through others" if cosine is None else f", with the cosine {cosine:.3f}")
        details = {"twin": twin, "cosine": cosine}
        results.append(Dropped(id=entry.id, source=entry.source, rule="duplicate", why=why, details=details))
    return results


def film_families(clips: Mapping[str, Clip], twins: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """The first name among the films that share twins, by film. Films without twins are left out."""
    return _families([(clips[a].source, clips[b].source) for a, b in twins])


def _candidates(prints: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """Pairs of clips of which any two prints, (N, F, D), have at least this cosine."""
    num_frames = prints.shape[1]
    flat = prints.reshape(-1, prints.shape[-1])
    numbers = np.flatnonzero(flat.any(axis=1))
    flat = np.ascontiguousarray(flat[numbers])
    pairs: set[tuple[int, int]] = set()
    for first, cosines, nearest in _search(flat):
        rows, columns = np.nonzero((cosines >= threshold) & (nearest >= 0))
        a, b = numbers[first + rows] // num_frames, numbers[nearest[rows, columns]] // num_frames
        pairs |= {(min(pair), max(pair)) for pair in zip(a.tolist(), b.tolist()) if pair[0] != pair[1]}
    return pairs


def _search(flat: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the first number of each part of vectors (M, D), with the cosines and numbers of their nearest neighbours."""
    faiss = import_optional("faiss", "curation")
    if not len(flat):
        return
    index = faiss.IndexFlatIP(flat.shape[1])
    if len(flat) > EXACT_PRINTS:
        num_clusters = len(flat) // PRINTS_PER_CLUSTER
        index = faiss.IndexIVFFlat(index, flat.shape[1], num_clusters, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(CLUSTERS_SEARCHED, num_clusters)
        index.train(flat)  # on a sample, with a fixed seed
    index.add(flat)
    for first in range(0, len(flat), QUERIES_AT_ONCE):
        yield first, *index.search(flat[first : first + QUERIES_AT_ONCE], min(NEIGHBOURS, len(flat)))


def _families(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The first name of each connected component, by its members."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return {name: root(name) for name in parent}
