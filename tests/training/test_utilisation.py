import pytest
import torch

from mask2dit import Mask2DiTPipeline
from mask2dit.data.config import DataConfig
from mask2dit.training.utilisation import peak_flops, training_flops


def test_flops_are_those_of_matrix_products_and_grouped_attention(small_model):
    skeleton = Mask2DiTPipeline.skeleton(small_model)
    data = DataConfig(manifest="unused", num_scenes=3, num_frames=9, height=64, width=96)
    transformer = skeleton.transformer
    _, frames, (_, height, width) = skeleton.video_shape(64, 96, 9, 3)
    layout = transformer.scene_layout(height, width, frames)
    config = transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    text, video = sum(layout.text_lengths), sum(layout.video_lengths)
    products = 24 * (text + video) * channels**2
    # v2: each prompt sees its scene, each scene's video its prompt and all video.
    pairs = sum(t * (t + v) + v * (t + video) for t, v in zip(layout.text_lengths, layout.video_lengths))
    blocks = config.num_layers * (products + 4 * pairs * channels)
    # What lies outside the blocks' products is embeddings, projections and modulation.
    assert blocks < training_flops(skeleton, data) / 3 < 1.3 * blocks


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA H200", "fp32", None),
        ("Another", "bf16", None),
    ],
)
def test_the_peak_is_known_for_known_devices(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops(precision) == expected


def test_no_peak_is_known_without_a_gpu():
    assert torch.cuda.is_available() or peak_flops("bf16") is None
