"""Scenes as spans of tokens: the one definition of the order of text and video in the sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise

Span = tuple[int, int]  # (start, stop) in the joint sequence


@dataclass(frozen=True)
class SceneLayout:
    """The token sequence `[T_1 … T_S | V_1 … V_S]` of S scenes: all text first, then all video.

    Args:
        text_lengths: text tokens of each scene.
        video_lengths: video tokens of each scene.

    Raises:
        ValueError: if there is no scene, the numbers of scenes differ, or a length is not positive.
    """

    text_lengths: tuple[int, ...]
    video_lengths: tuple[int, ...]

    def __post_init__(self):
        # Lists are accepted, but a layout is a key of caches and compiled graphs, so it has to be hashable.
        object.__setattr__(self, "text_lengths", tuple(self.text_lengths))
        object.__setattr__(self, "video_lengths", tuple(self.video_lengths))
        if not self.text_lengths or len(self.text_lengths) != len(self.video_lengths):
            raise ValueError(
                "a layout needs one text and one video length for each of at least one scene, but got "
                f"{len(self.text_lengths)} text lengths and {len(self.video_lengths)} video lengths"
            )
        if min(self.text_lengths + self.video_lengths) < 1:
            raise ValueError(
                f"every scene needs at least one text and one video token, but got text_lengths={self.text_lengths} "
                f"and video_lengths={self.video_lengths}"
            )

    @property
    def num_scenes(self) -> int:
        return len(self.text_lengths)

    @property
    def text_length(self) -> int:
        """Number of text tokens of all scenes, and so the index of the first video token."""
        return sum(self.text_lengths)

    @property
    def video_length(self) -> int:
        """Number of video tokens of all scenes."""
        return sum(self.video_lengths)

    @property
    def length(self) -> int:
        """Number of tokens in the sequence, N."""
        return self.text_length + self.video_length

    @property
    def text_spans(self) -> tuple[Span, ...]:
        """Span of each scene's text."""
        return tuple(spans(self.text_lengths))

    def select(self, chosen: Sequence[bool]) -> "SceneLayout":
        """Returns the layout of the scenes that are marked True alone."""
        return SceneLayout(tuple(compress(self.text_lengths, chosen)), tuple(compress(self.video_lengths, chosen)))

    @property
    def video_spans(self) -> tuple[Span, ...]:
        """Span of each scene's video."""
        return tuple(spans(self.video_lengths, start=self.text_length))


def spans(lengths: tuple[int, ...], start: int = 0) -> Iterator[Span]:
    """Yields the (start, stop) of consecutive spans of these lengths, beginning at `start`."""
    return pairwise(accumulate(lengths, initial=start))
