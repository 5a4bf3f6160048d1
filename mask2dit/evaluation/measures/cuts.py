"""Cuts of a story by PySceneDetect or TransNet V2."""

from mask2dit.evaluation.config import CutConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo, detector_version, story_cuts
from mask2dit.video.cuts import compare_cuts


class CutMeasure(Measure):
    """Agreement of the video's cuts with its scene boundaries."""

    name = "cuts"
    columns = (
        Column("shot_cut_accuracy", "Shot-cut accuracy"),
        Column("cut_deviation", "Deviation of cuts (frames)", "lower", is_percentage=False),
    )

    def __init__(self, config: CutConfig):
        self.config = config
        self.identity = f"{detector_version(config)} {config}"

    def score(self, video: StoryVideo) -> Scores:
        detected = story_cuts(video.reader, self.config)
        result = compare_cuts(detected, video.boundaries, self.config.tolerance)
        values = {"shot_cut_accuracy": result.accuracy, "cut_deviation": result.deviation}
        return Scores(values, {"detected": detected, "intended": list(video.boundaries)})
