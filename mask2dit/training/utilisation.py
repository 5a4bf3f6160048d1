"""How much of a device's arithmetic a run uses: model FLOP utilisation (Chowdhery et al. 2022, App. B)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mask2dit.data.config import DataConfig
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

# Dense 16-bit matrix products, in FLOP a second, from NVIDIA's data sheets; the first name found in the device's counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(precision: str) -> float | None:
    """What this machine's GPU can do in a second, or None where that is not known: no GPU, another one, or float32."""
    if precision == "fp32" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in PEAK_FLOPS.items() if known in name), None)


def training_flops(skeleton: Mask2DiTPipeline, data: DataConfig) -> float:
    """Floating-point operations of one sample, forward and backward, without what checkpointing computes again.

    Counted by torch in the matrix products and the attention of a forward pass without data; a backward pass takes twice
    as many.

    Args:
        skeleton: from `Mask2DiTPipeline.skeleton`.
        data: the size of a sample.
    """
    transformer = skeleton.transformer
    _, latent_frames, (channels, height, width) = skeleton.video_shape(
        data.height, data.width, data.num_frames, data.num_scenes
    )
    config = transformer.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(
            torch.empty(1, sum(latent_frames), channels, height, width),
            torch.empty(1, data.num_scenes * config.max_text_seq_length, config.text_embed_dim),
            torch.zeros(1, dtype=torch.long),
            scene_frames=latent_frames,
        )
    return 3 * counter.get_total_flops()
