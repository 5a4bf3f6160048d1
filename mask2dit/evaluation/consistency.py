"""Consistency of a story from the features of its scenes: 100 times the cosine, as in the paper's tables.

Shapes: S scenes, E embedding.
"""

from collections.abc import Sequence, Set
from itertools import combinations

import numpy as np

from mask2dit.encoders.features import normalise


def similarity_matrix(video: np.ndarray) -> np.ndarray:
    """100 v_i·v_j for all pairs of scenes, (S, S), from features (S, E)."""
    video = normalise(video)
    return 100 * video @ video.T


def visual_scores(similarity: np.ndarray, actors: Sequence[Set[str]]) -> dict[str, float | None]:
    """Means of a similarity matrix over pairs of scenes.

    Args:
        similarity: (S, S), from `similarity_matrix`.
        actors: the actors of each scene.

    Returns:
        "visual": over all pairs i < j, the paper's visual consistency; "visual_adjacent": over neighbours;
        "visual_minimum": the least similar pair; "visual_first_last": the first and the last scene; "visual_shared_actor":
        over pairs with an actor in common, None if there are none. All are None for a single scene.
    """
    pairs = list(combinations(range(len(similarity)), 2))
    values = {pair: float(similarity[pair]) for pair in pairs}
    shared = [values[i, j] for i, j in pairs if actors[i] & actors[j]]
    return {
        "visual": _mean(list(values.values())),
        "visual_adjacent": _mean([values[i, j] for i, j in pairs if j == i + 1]),
        "visual_minimum": min(values.values(), default=None),
        "visual_first_last": values.get((0, len(similarity) - 1)),
        "visual_shared_actor": _mean(shared),
    }


def semantic_score(video: np.ndarray, text: np.ndarray) -> float:
    """The mean of 100 v_k·t_k over scenes, from features (S, E) each: the paper's semantic consistency.

    Raises:
        ValueError: if the numbers of texts and scenes differ.
    """
    if len(video) != len(text):
        raise ValueError(f"there are {len(text)} texts for {len(video)} scenes: give one for each")
    return float(100 * np.mean(np.sum(normalise(video) * normalise(text), axis=1)))


def chunked_semantic_score(video: np.ndarray, chunks: Sequence[np.ndarray]) -> float:
    """Like `semantic_score`, but first averages 100 v_k·t over the chunks (C, E) of each scene's text."""
    video = normalise(video)
    return float(100 * np.mean([np.mean(normalise(texts) @ scene) for scene, texts in zip(video, chunks)]))


def sequence_score(visual: float | None, semantic: float) -> float | None:
    """The average of visual and semantic consistency: the paper's sequence consistency."""
    return None if visual is None else (visual + semantic) / 2


def within_scene_score(first_halves: np.ndarray, second_halves: np.ndarray) -> float:
    """The mean similarity of each scene's first half with its second, from features (S, E) each."""
    return float(100 * np.mean(np.sum(normalise(first_halves) * normalise(second_halves), axis=1)))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
