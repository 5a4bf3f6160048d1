"""Cuts of a story by PySceneDetect."""

from mask2dit.evaluation.config import CutConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.video.cuts import compare_cuts, detect_cuts


class CutMeasure(Measure):
    """Agreement of the video's cuts with its scene boundaries."""

    name = "cuts"
    columns = (
        Column("shot_cut_accuracy", "Shot-cut accuracy"),
        Column("cut_deviation", "Deviation of cuts (frames)", "lower", is_percentage=False),
    )

    def __init__(self, config: CutConfig):
        import scenedetect  # of an optional extra; if missing, fails here rather than at the first story

        self.config = config
        self.identity = f"scenedetect {scenedetect.__version__} {config}"

    def score(self, video: StoryVideo) -> Scores:
        detected = detect_cuts(video.reader, self.config.threshold, self.config.min_scene_frames)
        result = compare_cuts(detected, video.boundaries, self.config.tolerance)
        values = {"shot_cut_accuracy": result.accuracy, "cut_deviation": result.deviation}
        return Scores(values, {"detected": detected, "intended": list(video.boundaries)})
