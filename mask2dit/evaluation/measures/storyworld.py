"""Ground truth of small-world stories, read from pixels, with which learned scores can be compared."""

import numpy as np

from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.stories import Story
from mask2dit.storyworld.measure import code_identity, measure_scene, visual_consistency
from mask2dit.storyworld.observe import find_cuts
from mask2dit.storyworld.world import parse_caption


class StoryWorldMeasure(Measure):
    """Semantic accuracy, visual consistency and cuts of stories of the small world, times 100.

    Visual consistency is 100 for identical scenes and 0 for the chance agreement of unrelated stories, so it may be negative.
    """

    name = "storyworld"
    columns = (
        Column("world_visual", "Small world: visual", truth_of="visual"),
        Column("world_semantic", "Small world: semantic", truth_of="semantic"),
        Column("world_all_right", "Small world: scenes all right", truth_of="semantic"),
        Column("world_cuts_right", "Small world: cuts right", truth_of="shot_cut_accuracy"),
    )

    def __init__(self):
        self.identity = f"storyworld {code_identity()}"

    def reason_against(self, story: Story) -> str | None:
        try:
            for prompt in story.prompts:
                parse_caption(prompt)
        except ValueError as error:
            return str(error)
        return None

    def score(self, video: StoryVideo) -> Scores:
        descriptions = [parse_caption(prompt) for prompt in video.story.prompts]
        frames = video.frames(range(video.reader.num_frames)).numpy()
        scenes = [
            measure_scene(frames[start:stop], description)
            for (start, stop), description in zip(video.scenes, descriptions)
        ]
        several = len(scenes) > 1
        values = {
            "world_visual": 100 * visual_consistency(scenes).overall if several else None,
            "world_semantic": float(100 * np.mean([scene.share_right for scene in scenes])),
            "world_all_right": float(100 * np.mean([scene.all_right for scene in scenes])),
            "world_cuts_right": 100.0 * (find_cuts(frames) == video.boundaries),
        }
        return Scores(values, {"right": [scene.right for scene in scenes]})
