"""The interface of all measures of a story's video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mask2dit.evaluation.videos import StoryVideo
from mask2dit.stories import Story


@dataclass(frozen=True)
class Column:
    """One number per story in the report."""

    key: str
    title: str
    better: str | None = "higher"
    """Better direction: higher, lower, or None if neither is better."""
    is_percentage: bool = True
    """True if values share an axis with cosines and shares times 100."""
    truth_of: str | None = None
    """For ground truth: the learned column that is meant to measure the same. The report correlates them."""


@dataclass(frozen=True)
class Scores:
    """The scores of one story by a measure.

    Raises:
        ValueError: for a value that is not finite, which would make the means of the report so.
    """

    values: dict[str, float | None]
    """Values by column key; None where there is no value."""
    details: dict = field(default_factory=dict)
    """Further details, as JSON values."""

    def __post_init__(self):
        for key, value in self.values.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{key} is {value}: the measure's weights or the video are damaged")


class Measure:
    """Base of all measures."""

    name: str
    columns: Sequence[Column]
    identity: str
    """Weights and settings that scores depend on, besides the video. Scores with another identity are computed again."""
    is_untrained: bool = False
    """True if the weights are random, so that scores mean nothing."""
    uses_gpu: bool = False
    """True if it runs a model in its process."""
    is_of_one_process: bool = False
    """True if another program or an endpoint does the work, so that several processes would not help."""

    def reason_against(self, story: Story) -> str | None:
        """The reason why this measure does not apply to a story, which is not a fault; None if it applies."""
        return None

    def prepare(self, videos: Sequence[StoryVideo]) -> None:
        """Called once with all videos that will be scored, for work that is cheaper in one batch."""

    def score(self, video: StoryVideo) -> Scores:
        raise NotImplementedError
