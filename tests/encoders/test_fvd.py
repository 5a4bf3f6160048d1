import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from mask2dit.encoders import fvd
from mask2dit.encoders.fvd import I3D, FeatureExtractor, VideoMAE, load_extractor, pad_same


def on_meta(model_class):
    with torch.device("meta"):
        return model_class()


def test_videomae_has_the_names_and_sizes_of_the_published_giant():
    weights = on_meta(VideoMAE).state_dict()
    assert weights["patch_embed.proj.weight"].shape == (1408, 3, 2, 14, 14)
    assert weights["blocks.39.attn.qkv.weight"].shape == (3 * 1408, 1408)
    assert weights["blocks.0.mlp.fc1.weight"].shape == (6144, 1408)
    assert {name.removeprefix("blocks.0.") for name in weights if name.startswith("blocks.0.")} == {
        *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
        *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")),
    }
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= weights.keys()
    assert len(weights) == 526


def test_videomae_computes_what_transformers_does():
    torch.manual_seed(0)
    ours = VideoMAE(width=24, depth=2, heads=3, hidden=40, patch_size=8, resolution=16, num_frames=4, num_classes=5)
    for value in ours.parameters():
        torch.nn.init.normal_(value, std=0.2)
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, layer_norm_eps=1e-6, num_labels=5, use_mean_pooling=True,
    )  # fmt: skip
    theirs = VideoMAEForVideoClassification(config).eval()
    video = torch.rand(2, 3, 4, 16, 16)
    weights = ours.state_dict()
    renamed = {"fc_norm.weight": weights["fc_norm.weight"], "fc_norm.bias": weights["fc_norm.bias"]}
    renamed |= {"classifier.weight": weights["head.weight"], "classifier.bias": weights["head.bias"]}
    for kind in ("weight", "bias"):
        renamed[f"videomae.embeddings.patch_embeddings.projection.{kind}"] = weights[f"patch_embed.proj.{kind}"]
    theirs_names = theirs.state_dict().keys()
    for i in range(2):
        old, new = f"blocks.{i}", f"videomae.encoder.layer.{i}"
        query, key, value = weights[f"{old}.attn.qkv.weight"].chunk(3)
        attention = f"{new}.attention.attention"
        renamed |= {
            f"{attention}.query.weight": query,
            f"{attention}.key.weight": key,
            f"{attention}.value.weight": value,
        }
        renamed |= {
            f"{attention}.query.bias": weights[f"{old}.attn.q_bias"],
            f"{attention}.value.bias": weights[f"{old}.attn.v_bias"],
        }
        for theirs_part, part in (
            ("attention.output.dense", "attn.proj"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            for kind in ("weight", "bias"):
                renamed[f"{new}.{theirs_part}.{kind}"] = weights[f"{old}.{part}.{kind}"]
    assert renamed.keys() == theirs_names
    theirs.load_state_dict(renamed)
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2)).logits
        torch.testing.assert_close(ours.head(ours(video)), expected, atol=1e-4, rtol=1e-4)


def test_i3d_has_the_names_and_sizes_of_the_weights_for_kinetics():
    weights = on_meta(I3D).state_dict()
    assert sum(value.numel() for value in on_meta(I3D).parameters()) == 12_697_264
    assert weights["Mixed_5c.b2b.conv3d.weight"].shape == (128, 48, 3, 3, 3)
    assert {"Conv3d_1a_7x7.bn.running_mean", "logits.conv3d.bias", "Mixed_3b.b3b.bn.weight"} <= weights.keys()


def test_padding_is_tensorflows_which_puts_the_odd_one_at_the_end():
    padded = pad_same(torch.ones(1, 1, 4, 5, 6), (3, 3, 3), (2, 1, 2))
    assert padded.shape == (1, 1, 5, 7, 7)
    assert padded[0, 0, :, 3, 3].tolist() == [1, 1, 1, 1, 0]


def test_i3d_gives_one_row_of_logits_a_clip():
    with torch.inference_mode():
        assert I3D(num_classes=7).eval()(torch.randn(1, 3, 16, 224, 224)).shape == (1, 7)


def test_clips_are_stretched_and_scaled_to_what_the_model_takes():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(2, 3, 4))

    clip = torch.full((16, 20, 30, 3), 255, dtype=torch.uint8)
    features = FeatureExtractor(Model(), (-1.0, 1.0), torch.device("cpu"))([clip, clip * 0])
    assert seen[0].shape == (2, 3, 16, 224, 224)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, [[1, 1, 1], [-1, -1, -1]])


@pytest.mark.parametrize("key", ["model", "module", None])
def test_weights_load_from_the_keys_in_use(tmp_path, monkeypatch, key):
    monkeypatch.setattr(fvd, "VideoMAE", lambda: VideoMAE(8, 1, 2, 8, 112))
    weights = VideoMAE(8, 1, 2, 8, 112).state_dict()
    torch.save({key: weights} if key else weights, tmp_path / "weights.pth")
    extract = load_extractor("videomae", tmp_path / "weights.pth", torch.device("cpu"))
    assert extract([torch.zeros(16, 8, 8, 3, dtype=torch.uint8)]).shape == (1, 8)


def test_other_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth' does not hold the weights of I3D"):
        load_extractor("i3d", tmp_path / "weights.pth", torch.device("cpu"))
