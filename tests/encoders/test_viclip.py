import json

import pytest
import torch
from safetensors.torch import save_file

from mask2dit.encoders.untrained import build_untrained_viclip
from mask2dit.encoders.viclip import ViCLIP, load_viclip, preprocess

L14 = {
    "input_resolution": 224,
    "patch_size": 14,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "embed_dim": 768,
    "vocab_size": 49408,
    "text_width": 768,
    "text_heads": 12,
    "text_layers": 12,
}
B16 = {
    **L14,
    "patch_size": 16,
    "vision_width": 768,
    "vision_layers": 12,
    "vision_heads": 12,
    "embed_dim": 512,
    "text_width": 512,
    "text_heads": 8,
}


@pytest.fixture
def tiny(parity):
    """The published model, tiny, and its file of numbers."""
    numbers = parity("viclip_tiny")
    model = ViCLIP(**json.loads(numbers.settings["config"]))
    model.load_state_dict({k: v for k, v in numbers.tensors.items() if not k.startswith(("in.", "out."))})
    return model.eval().requires_grad_(False), numbers


def test_features_equal_the_published_implementation(tiny):
    model, numbers = tiny
    torch.testing.assert_close(
        model.encode_video(numbers["in.video"]), numbers["out.vision_features"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        model.encode_text(numbers["in.tokens"]), numbers["out.text_features"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "config, parameters, tensors", [(L14, 427_590_145, 447), (B16, 149_603_841, 303)], ids=["L", "B"]
)
def test_names_and_sizes_are_those_of_the_public_weights(config, parameters, tensors):
    with torch.device("meta"):
        weights = ViCLIP(**config).state_dict()
    assert (sum(value.numel() for value in weights.values()), len(weights)) == (parameters, tensors)
    assert {name.split(".")[0] for name in weights} == {"vision_encoder", "text_encoder", "temp"}


def wide() -> ViCLIP:
    """Heads are 64 wide, as in the public weights."""
    torch.manual_seed(0)
    return ViCLIP(16, 8, 128, 2, 2, 24, 64, 64, 1, 3, num_frames=4).eval()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_files_load_with_sizes_read_from_shapes(tmp_path, suffix):
    model = wide()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = load_viclip(path)
    video = torch.randn(1, 3, 4, 16, 16)
    torch.testing.assert_close(loaded.encode_video(video), model.encode_video(video))
    tokens = torch.tensor([[62, 3, 63] + [0] * 29])
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))


def test_an_untrained_model_is_built_once_and_only_under_a_name_that_says_so(tmp_path):
    path = build_untrained_viclip(tmp_path / "untrained.safetensors")
    assert load_viclip(path).encode_video(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 16)
    before = path.stat().st_mtime_ns
    assert build_untrained_viclip(path).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"'viclip\.safetensors' has to be named untrained"):
        build_untrained_viclip(tmp_path / "viclip.safetensors")


def test_other_weights_and_damaged_ones_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no weights .*nowhere"):
        load_viclip(tmp_path / "nowhere.pth")
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged\.pth.*cannot be read"):
        load_viclip(tmp_path / "damaged.pth")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*does not hold the weights of a ViCLIP"):
        load_viclip(tmp_path / "other.pth")
    weights = wide().state_dict()
    del weights["text_encoder.ln_final.bias"]
    torch.save({"model": weights}, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"text_encoder\.ln_final\.bias"):
        load_viclip(tmp_path / "partial.pth")


def test_videos_and_texts_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 16, 16\), but is \(1, 3, 8, 16, 16\)"):
        wide().encode_video(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 32\), but are \(1, 77\)"):
        wide().encode_text(torch.zeros(1, 77, dtype=torch.long))


def test_published_preprocessing_stretches_and_the_vbench_one_crops():
    frames = torch.zeros(2, 20, 60, 3, dtype=torch.uint8)
    frames[:, :, :20] = 255  # a third of the width, which a crop of the centre leaves out
    stretched, cropped = preprocess(frames, 20), preprocess(frames, 20, "vbench")
    assert stretched.shape == cropped.shape == (3, 2, 20, 20)
    assert stretched[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, abs=1e-3)
    assert stretched[0, 0, 0, -1] == pytest.approx(-0.485 / 0.229, abs=1e-3)
    assert cropped[0].unique().tolist() == pytest.approx([-0.48145466 / 0.26862954], abs=1e-3)
    with pytest.raises(ValueError, match="one of published, vbench, but is 'clip'"):
        preprocess(frames, 20, "clip")
