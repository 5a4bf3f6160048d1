"""What every measure of a story's video has."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mask2dit.evaluation.videos import StoryVideo
from mask2dit.stories import Story


@dataclass(frozen=True)
class Column:
    """One number of a story in the report."""

    key: str
    title: str
    better: str | None = "higher"
    """higher, lower, or None for what is neither good nor bad."""
    is_percentage: bool = True
    """Whether it shares an axis with cosines and shares times 100."""
    truth_of: str | None = None
    """For what is known and not learned: the column that is meant to measure the same. The report correlates them."""


@dataclass(frozen=True)
class Scores:
    """What a measure says of one story."""

    values: dict[str, float | None]
    """By the keys of the measure's columns; None where there is no value."""
    details: dict = field(default_factory=dict)
    """Anything more, as JSON has it."""


class Measure:
    """Base of all measures."""

    name: str
    columns: Sequence[Column]
    identity: str
    """What scores depend on besides the video: weights and settings. Scores with another identity are computed again."""
    is_untrained: bool = False
    """True if the weights are random, so that scores mean nothing."""

    def reason_against(self, story: Story) -> str | None:
        """Why this measure has nothing to say of a story, which is no fault; None if it has."""
        return None

    def prepare(self, videos: Sequence[StoryVideo]) -> None:
        """Called once with all videos that are going to be scored, for what is cheaper at once."""

    def score(self, video: StoryVideo) -> Scores:
        raise NotImplementedError
