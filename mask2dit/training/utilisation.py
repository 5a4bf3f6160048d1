"""Model FLOP utilisation: the share of a device's peak arithmetic that a run uses (Chowdhery et al. 2022, App. B)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mask2dit.data.config import DataConfig
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

# Dense 16-bit matrix products in FLOP per second, from NVIDIA's data sheets. The first key contained in the device's name
# is used.
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
    """The peak FLOP per second of this machine's GPU; None if it is unknown: no GPU, an unlisted one, or float32."""
    if precision == "fp32" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in PEAK_FLOPS.items() if known in name), None)


def training_flops(skeleton: Mask2DiTPipeline, data: DataConfig) -> float:
    """Floating-point operations per sample, forward and backward, without recomputation by checkpointing.

    torch counts them in the matrix products and the attention of a forward pass on the meta device; a backward pass takes
    twice as many.

    Args:
        skeleton: from `Mask2DiTPipeline.skeleton`.
        data: the configuration of the clips, with the size of a sample.
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
