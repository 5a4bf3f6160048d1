import numpy as np
import pytest
import torch

from mask2dit.evaluation.config import QualityConfig
from mask2dit.evaluation.measures.quality import AestheticMeasure, FrameConsistencyMeasure, frame_consistency

CPU = torch.device("cpu")


def test_frames_that_stay_the_same_are_fully_consistent_and_a_change_is_seen_twice():
    same = np.array([[1.0, 0]] * 3)
    assert frame_consistency(same) == pytest.approx(100)
    # Frame 2: unlike both others. Frame 3: like the first, unlike the one before it.
    assert frame_consistency(np.array([[1.0, 0], [0, 1], [1, 0]])) == pytest.approx(100 * (0 + 0.5) / 2)
    assert frame_consistency(np.array([[1.0, 0], [-1, 0]])) == 0


def linear_head(path, width=12):
    torch.save({"weight": torch.zeros(1, width), "bias": torch.tensor([5.0])}, path)
    return str(path)


def test_the_aesthetic_score_is_the_heads_mean(clip_folder, tmp_path, story_video):
    config = QualityConfig(clip=clip_folder, aesthetic_head=linear_head(tmp_path / "head.pth"), num_frames=2)
    assert AestheticMeasure(config, CPU).score(story_video).values == {"aesthetic": 5.0}
    with pytest.raises(ValueError, match=r"takes 768 features, but the CLIP .* gives 12"):
        AestheticMeasure(QualityConfig(clip=clip_folder, aesthetic_head=linear_head(tmp_path / "l14.pth", 768)), CPU)


def test_steady_scenes_are_consistent_within(dino_folder, story_video):
    measure = FrameConsistencyMeasure("subject_consistency", dino_folder, 4, CPU)
    assert measure.score(story_video).values["subject_consistency"] > 95
