import numpy as np
import pytest
import torch

from mask2dit.encoders.frames import FrameEncoder, load_aesthetic_head

CPU = torch.device("cpu")


@pytest.mark.parametrize("folder", ["clip_folder", "dino_folder"])
def test_frames_become_features_of_length_one(folder, request):
    encode = FrameEncoder(request.getfixturevalue(folder), CPU)
    features = encode(torch.randint(256, (3, 40, 60, 3), dtype=torch.uint8))
    assert features.shape == (3, 12 if folder == "clip_folder" else 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_clip_looks_at_the_centre_and_dino_at_the_whole(clip_folder, dino_folder):
    frames = torch.zeros(2, 32, 96, 3, dtype=torch.uint8)
    frames[1, :, :20] = 255
    assert np.ptp(FrameEncoder(clip_folder, CPU)(frames), axis=0).max() < 1e-6
    assert np.ptp(FrameEncoder(dino_folder, CPU)(frames), axis=0).max() > 1e-3


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not hold a model of transformers"):
        FrameEncoder(tmp_path, CPU)


def test_both_published_heads_load(tmp_path):
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.tensor([5.0])}, tmp_path / "linear.pth")
    assert load_aesthetic_head(tmp_path / "linear.pth")(torch.randn(2, 768)).flatten().tolist() == [5, 5]
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"layers.{i}.weight": torch.ones(shape) for i, shape in sizes.items()}
    weights |= {f"layers.{i}.bias": torch.zeros(shape[0]) for i, shape in sizes.items()}
    torch.save(weights, tmp_path / "perceptron.pth")
    result = load_aesthetic_head(tmp_path / "perceptron.pth")(torch.full((1, 768), 1 / 768))
    assert result.item() == pytest.approx(1024 * 128 * 64 * 16, rel=1e-4)
    torch.save({"weight": torch.zeros(1, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' is not one of LAION's"):
        load_aesthetic_head(tmp_path / "other.pth")
