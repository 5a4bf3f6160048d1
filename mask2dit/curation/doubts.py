"""Cuts that a person should look at: probably false ones, and transitions that may have been missed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mask2dit.curation.group import Group, adjacent_pairs
from mask2dit.curation.store import Dropped
from mask2dit.curation.write import Clip

# Frames before and after a possible transition that the page shows.
DISTANCE = 12


@dataclass(frozen=True, kw_only=True)
class DoubtfulCut:
    """Two frames of a film, between which a cut is doubtful."""

    source: str
    why: str
    frames: tuple[tuple[str, int], tuple[str, int]]
    """The id of a clip and a frame of it, before and after."""


def doubtful_cuts(
    windows: Iterable[Group | Dropped],
    clips: Mapping[str, Clip],
    ceiling: float,
    doubts: Mapping[str, Sequence[int]],
) -> list[DoubtfulCut]:
    """Cuts between neighbouring clips that look the same, and places inside a clip at which a transition is possible.

    Args:
        windows: results of the stage `group`.
        clips: clips by id.
        ceiling: cosine above which neighbouring clips count as one scene.
        doubts: frames at which a transition is possible, by the scene's id, which is the clip's.
    """
    found = [
        DoubtfulCut(
            source=clips[before].source,
            why=f"cut at frame {clips[after].start}: both sides look the same, with the cosine {cosine:.3f}",
            frames=((before, clips[before].num_frames - 1), (after, 0)),
        )
        for (before, after), cosine in adjacent_pairs(windows).items()
        if cosine > ceiling
    ]
    for clip in clips.values():
        for frame in doubts.get(clip.id, ()):
            if clip.start < frame < clip.stop:
                first, second = (
                    min(max(frame - clip.start + step, 0), clip.num_frames - 1) for step in (-DISTANCE, DISTANCE)
                )
                why = f"no cut at frame {frame}, where a transition is possible"
                found.append(DoubtfulCut(source=clip.source, why=why, frames=((clip.id, first), (clip.id, second))))
    return found
