"""Quality of frames and their consistency within a scene, as in VBench (arXiv 2311.17982).

Shapes: T frames, E embedding.
"""

import os
from pathlib import Path

import numpy as np
import torch

from mask2dit.encoders.frames import FrameEncoder, load_aesthetic_head
from mask2dit.evaluation.config import QualityConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.hashing import fingerprint
from mask2dit.video.frames import middle_frames


class AestheticMeasure(Measure):
    """LAION's aesthetic score, about 1 … 10, by CLIP L/14: the mean over frames of all scenes."""

    name = "aesthetic"
    uses_gpu = True
    columns = (Column("aesthetic", "Aesthetic score", is_percentage=False),)

    def __init__(self, config: QualityConfig, device: torch.device):
        self.encode = FrameEncoder(config.clip, device)
        self.head = load_aesthetic_head(config.aesthetic_head)
        width = next(self.head.parameters()).shape[1]
        if self.encode.model.config.projection_dim != width:
            raise ValueError(
                f"{config.aesthetic_head} takes {width} features, but the CLIP in {config.clip} gives "
                f"{self.encode.model.config.projection_dim}: LAION's heads belong to ViT-L/14"
            )
        self.num_frames = config.num_frames
        self.identity = f"{fingerprint(config.clip)} {fingerprint(config.aesthetic_head)} {config.num_frames}"

    @torch.inference_mode()
    def score(self, video: StoryVideo) -> Scores:
        scenes = []
        for start, stop in video.scenes:
            features = self.encode(video.frames(middle_frames(start, stop, self.num_frames)))
            scenes.append(float(self.head(torch.from_numpy(features)).mean()))
        return Scores({"aesthetic": float(np.mean(scenes))}, {"scenes": scenes})


class FrameConsistencyMeasure(Measure):
    """Similarity of frames within a scene, times 100, as in VBench.

    Each frame's score is the mean of its cosines with the scene's first frame and with the previous frame. Scores are
    averaged over the frames of a scene, then over scenes.
    """

    uses_gpu = True

    def __init__(self, name: str, folder: str | os.PathLike, num_frames: int, device: torch.device):
        self.name = name
        self.columns = (Column(name, f"{name.replace('_', ' ').capitalize()} within scenes"),)
        self.encode = FrameEncoder(folder, device)
        self.num_frames = num_frames
        self.identity = f"{name} {fingerprint(Path(folder))} {num_frames}"

    def score(self, video: StoryVideo) -> Scores:
        scenes = [
            frame_consistency(self.encode(video.frames(middle_frames(*scene, self.num_frames))))
            for scene in video.scenes
        ]
        return Scores({self.name: float(np.mean(scenes))}, {"scenes": scenes})


def frame_consistency(features: np.ndarray) -> float:
    """The consistency of a scene from frame features (T, E) with norm 1. Negative cosines count as 0."""
    to_first = (features[1:] @ features[0]).clip(0)
    to_previous = np.sum(features[1:] * features[:-1], axis=1).clip(0)
    return float(100 * np.mean((to_first + to_previous) / 2))
