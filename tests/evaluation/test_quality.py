import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from mask2dit.evaluation.config import QualityConfig
from mask2dit.evaluation.quality import (
    AestheticMeasure,
    FrameConsistencyMeasure,
    FrameEncoder,
    frame_consistency,
    load_aesthetic_head,
)

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def clip(tmp_path):
    """A whole CLIP, as published folders hold it."""
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**SIZES, "vocab_size": 10}, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.fixture
def dino(tmp_path):
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(tmp_path / "dino")
    return str(tmp_path / "dino")


def test_frames_that_stay_the_same_are_fully_consistent_and_a_change_is_seen_twice():
    same = np.array([[1.0, 0]] * 3)
    assert frame_consistency(same) == pytest.approx(100)
    # Frame 2: unlike both others. Frame 3: like the first, unlike the one before it.
    assert frame_consistency(np.array([[1.0, 0], [0, 1], [1, 0]])) == pytest.approx(100 * (0 + 0.5) / 2)
    assert frame_consistency(np.array([[1.0, 0], [-1, 0]])) == 0


@pytest.mark.parametrize("folder", ["clip", "dino"])
def test_frames_become_features_of_length_one(folder, request):
    encode = FrameEncoder(request.getfixturevalue(folder), CPU)
    features = encode(torch.randint(256, (3, 40, 60, 3), dtype=torch.uint8))
    assert features.shape == (3, 12 if folder == "clip" else 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_clip_looks_at_the_centre_and_dino_at_the_whole(clip, dino):
    frames = torch.zeros(2, 32, 96, 3, dtype=torch.uint8)
    frames[1, :, :20] = 255
    assert np.ptp(FrameEncoder(clip, CPU)(frames), axis=0).max() < 1e-6
    assert np.ptp(FrameEncoder(dino, CPU)(frames), axis=0).max() > 1e-3


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not hold a model of transformers"):
        FrameEncoder(tmp_path, CPU)


def linear_head(path, width=12):
    torch.save({"weight": torch.zeros(1, width), "bias": torch.tensor([5.0])}, path)
    return str(path)


def test_both_published_heads_load(tmp_path):
    assert load_aesthetic_head(linear_head(tmp_path / "linear.pth", 768))(torch.randn(2, 768)).flatten().tolist() == [
        5,
        5,
    ]
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"layers.{i}.weight": torch.ones(shape) for i, shape in sizes.items()}
    weights |= {f"layers.{i}.bias": torch.zeros(shape[0]) for i, shape in sizes.items()}
    torch.save(weights, tmp_path / "perceptron.pth")
    result = load_aesthetic_head(tmp_path / "perceptron.pth")(torch.full((1, 768), 1 / 768))
    assert result.item() == pytest.approx(1024 * 128 * 64 * 16, rel=1e-4)
    torch.save({"weight": torch.zeros(1, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' is not one of LAION's"):
        load_aesthetic_head(tmp_path / "other.pth")


def test_the_aesthetic_score_is_the_heads_mean(clip, tmp_path, story_video):
    config = QualityConfig(clip=clip, aesthetic_head=linear_head(tmp_path / "head.pth"), num_frames=2)
    assert AestheticMeasure(config, CPU).score(story_video).values == {"aesthetic": 5.0}
    with pytest.raises(ValueError, match=r"takes 768 features, but the CLIP .* gives 12"):
        AestheticMeasure(QualityConfig(clip=clip, aesthetic_head=linear_head(tmp_path / "l14.pth", 768)), CPU)


def test_steady_scenes_are_consistent_within(dino, story_video):
    measure = FrameConsistencyMeasure("subject_consistency", dino, 4, CPU)
    assert measure.score(story_video).values["subject_consistency"] > 95
