"""Groups of consecutive clips of a film that look like one story: neither unrelated nor the same scene cut in error."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

from mask2dit.curation.config import GroupConfig
from mask2dit.curation.embed import Features, read_features
from mask2dit.curation.store import Dropped, Entry
from mask2dit.curation.write import Clip
from mask2dit.data.clips import describe_required_frames, required_frames
from mask2dit.data.config import DataConfig
from mask2dit.hashing import digest


@dataclass(frozen=True, kw_only=True)
class FilmClips(Entry):
    """The clips of a film that have features, in order."""

    clips: tuple[Clip, ...]
    features: tuple[Features, ...]
    gaps: tuple[float, ...]
    """Seconds between each clip and the next, without the transition between them."""


@dataclass(frozen=True, kw_only=True)
class Group(Entry):
    """Consecutive clips, or a single clip that is captioned alone."""

    clips: list[str]
    """Ids of the clips."""
    similarity: list[list[float]]
    """Cosines of all pairs."""


def by_film(
    features: Sequence[Features], clips: Mapping[str, Clip], times: Mapping[str, float] | None = None
) -> list[FilmClips]:
    """Collects features into one entry per film.

    Args:
        features: features of clips.
        clips: clips by id.
        times: for films of one file per shot, the second at which each file begins in its film. None: a film is one file.
    """
    of_source: dict[str, list[Features]] = {}
    for entry in features:
        of_source.setdefault(entry.source, []).append(entry)

    def second(clip: Clip, frame: int) -> float:
        return (times[clip.file] if times else 0.0) + frame / clip.fps

    films = []
    for source, found in of_source.items():
        of_film = tuple(sorted(found, key=lambda entry: second(clips[entry.id], clips[entry.id].start)))
        in_order = tuple(clips[entry.id] for entry in of_film)
        gaps = tuple(
            round(second(after, after.start - after.transition) - second(before, before.stop), 6)
            for before, after in pairwise(in_order)
        )
        key = digest([entry.key for entry in of_film] + ([gaps] if times else []))
        films.append(FilmClips(id=source, source=source, key=key, clips=in_order, features=of_film, gaps=gaps))
    return films


def group(films: Iterable[FilmClips], folder: Path, config: GroupConfig) -> Iterator:
    """All windows of `num_scenes` clips of each film. Windows overlap; a clip is kept in its first group only."""
    for film in films:
        cosines = read_features(film.features, folder)
        cosines = cosines @ cosines.T
        results: list[Group | Dropped] = []
        free_from = 0
        for start in range(len(film.clips) - config.num_scenes + 1):
            window = slice(start, start + config.num_scenes)
            clips = film.clips[window]
            if clips[0].file == clips[-1].file:
                name = f"{clips[0].file}#{clips[0].start}-{clips[-1].stop}"
            else:
                name = f"{clips[0].id} … {clips[-1].id}"
            ids = [clip.id for clip in clips]
            similarity = cosines[window, window].astype(float).round(4).tolist()
            fault = find_fault(film.gaps[start : window.stop - 1], similarity, config)
            if fault is None and start < free_from:
                fault = ("overlap", "its first clips are in the group before it")
            if fault is None:
                free_from = window.stop
                results.append(Group(id=name, source=film.source, clips=ids, similarity=similarity))
            else:
                rule, why = fault
                details = {"clips": ids, "similarity": similarity}
                results.append(Dropped(id=name, source=film.source, rule=rule, why=why, details=details))
        yield film, results


def single(clips: Iterable[Clip], data: DataConfig) -> Iterator:
    """Makes each clip a group of its own, for pre-training. Drops clips that are too short for that."""
    for clip in clips:
        if clip.num_frames < required_frames(data):
            why = f"{clip.num_frames} frames, but {describe_required_frames(data)}"
            yield clip, [Dropped(id=clip.id, source=clip.source, rule="too_short_for_pretraining", why=why)]
        else:
            yield clip, [Group(id=clip.id, source=clip.source, clips=[clip.id], similarity=[[1.0]])]


def find_fault(
    gaps: Sequence[float], similarity: Sequence[Sequence[float]], config: GroupConfig
) -> tuple[str, str] | None:
    """The rule that keeps clips from being a group, with the reason; None if they are one."""
    for number, gap in enumerate(gaps, start=1):
        if gap > config.max_gap:
            return "gap", f"{gap:.2f} s between clips {number} and {number + 1}"
    for i, j in combinations(range(len(similarity)), 2):
        if similarity[i][j] > config.ceiling:
            return "above_ceiling", f"clips {i + 1} and {j + 1} have the cosine {similarity[i][j]:.3f}"
    least = min(range(len(gaps)), key=lambda i: similarity[i][i + 1])
    if similarity[least][least + 1] < config.threshold:
        why = f"clips {least + 1} and {least + 2} have the cosine {similarity[least][least + 1]:.3f}"
        return "below_threshold", why
    return None


def adjacent_pairs(windows: Iterable[Group | Dropped]) -> dict[tuple[str, str], float]:
    """The cosine of each pair of neighbouring clips, by their ids, in windows without a gap."""
    found = {}
    for window in windows:
        if isinstance(window, Dropped):
            if window.rule == "gap":
                continue
            clips, similarity = window.details["clips"], window.details["similarity"]
        else:
            clips, similarity = window.clips, window.similarity
        found |= {pair: similarity[i][i + 1] for i, pair in enumerate(pairwise(clips))}
    return found
