"""The small world's autoencoder: `python -m mask2dit.storyworld.vae [CONFIG.yaml] [key=value …]`.

`diffusers.AutoencoderKLCogVideoX`, only narrower and shallower than CogVideoX's, learned from rendered scenes. The folder
`output_dir` gets `metrics.jsonl`, pictures of held-out scenes beside their reconstructions, and in the end `vae/`.

Shapes: B scenes, F frames, H x W pixels, C latent channels, f x h x w latent size.
"""

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX

from mask2dit.command import run_command
from mask2dit.device import choose_device
from mask2dit.files import atomic_folder
from mask2dit.randomness import generator_for
from mask2dit.storyworld.learning import LearningConfig, learn
from mask2dit.storyworld.render import render_scene
from mask2dit.storyworld.world import Story, sample_story
from mask2dit.video.frames import to_uint8
from mask2dit.video.writing import contact_sheet, write_image

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class VAEConfig(LearningConfig):
    """An autoencoder and its training. `configs/storyworld/vae.yaml` holds values for all of it."""

    output_dir: str = "outputs/storyworld/vae"
    max_steps: int = 3600
    matrix_learning_rate: float = 0.04
    evaluate_every: int = 400
    batch_size: int = 3
    """Scenes per step."""
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32])
    """Channels per level; all levels but the last halve height and width, so that two of them make latents of half the
    size."""
    layers_per_block: int = 1
    """Residual layers per level."""
    latent_channels: int = 4
    """Channels of the latents."""
    temporal_compression_ratio: int = 2
    """Frames per latent frame, except for the first frame, which is a latent frame by itself. At most 2 for each level
    after the first."""
    norm_num_groups: int = 8
    """Groups of the group normalization."""
    num_frames: int = 9
    """Frames per scene."""
    height: int = 64
    """Height in pixels."""
    width: int = 64
    """Width in pixels."""
    crop: int = 32
    """Height and width of the random crops that are trained on, which cost less than whole pictures."""
    num_whole_steps: int = 200
    """Last steps, which train on whole pictures."""
    motion_weight: float = 4.0
    """Additional weight of a pixel's error per unit by which the pixel changes within the scene (at most 2), where every
    pixel has weight 1: moving things cover few pixels and are the hardest."""
    kl_weight: float = 1e-4
    """Weight of the divergence from the standard normal, averaged over latent elements, relative to the mean absolute
    error of pixels in [-1, 1]."""
    num_evaluated: int = 32
    """Held-out scenes per evaluation."""
    num_measured: int = 50
    """Batches of training scenes from which the scale of the latents is measured."""


def train_vae(config: VAEConfig) -> int:
    """Trains the autoencoder, or goes on with it, and writes `vae/` once it is done.

    Returns:
        The exit status: 0, or `command.PREEMPTED` after a SIGTERM.

    Raises:
        ValueError: for a size that the autoencoder cannot carry, and as `learn` raises it.
        FloatingPointError, OSError: as `learn` raises them.
    """
    vae = create_vae(config).to(choose_device(config.device))
    _check_size(config, vae)
    held_out = [_render(config, sample_story(seed, split="held_out"), 0) for seed in range(config.num_evaluated)]

    def losses(step: int) -> dict[str, torch.Tensor]:
        pixels = to_pixels(training_scenes(config, step), vae.device)  # (B, 3, F, H, W)
        if step < config.max_steps - config.num_whole_steps:
            pixels = _crop(config, pixels, step)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator_for(config.seed, "posterior", step))).sample
        change = (pixels.amax(dim=2, keepdim=True) - pixels.amin(dim=2, keepdim=True)).mean(dim=1, keepdim=True)
        weight = 1 + config.motion_weight * change  # (B, 1, 1, H, W)
        error = ((decoded.float() - pixels).abs() * weight).mean() / weight.mean()
        divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return {"loss": error + config.kl_weight * divergence, "error": error, "divergence": divergence}

    def evaluate(step: int) -> dict[str, float]:
        decoded = reconstruct(vae, held_out)
        scenes = [scene for pair in zip(held_out[:4], decoded[:4]) for scene in pair]
        sheet = contact_sheet(scenes, ["rendered", "reconstructed"] * (len(scenes) // 2), thumb_width=128)
        write_image(Path(config.output_dir) / f"reconstructions_{step:06d}.png", sheet)
        return {"psnr": psnr(held_out, decoded)}

    status = learn(config, vae, losses, evaluate)
    if not status:
        std = latent_std(vae, [training_scenes(config, step) for step in range(config.num_measured)])
        vae.register_to_config(scaling_factor=1 / std)
        # Half precision suffices and halves the size; the same weights serve every later stage.
        with atomic_folder(Path(config.output_dir) / "vae") as folder:
            vae.half().save_pretrained(folder)
        logger.info("Wrote %s, with latents of standard deviation %.3f before scaling", config.output_dir, std)
    return status


def create_vae(config: VAEConfig) -> AutoencoderKLCogVideoX:
    """An autoencoder with random weights that follow from the seed."""
    levels = len(config.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * levels,
            up_block_types=("CogVideoXUpBlock3D",) * levels,
            block_out_channels=tuple(config.block_out_channels),
            latent_channels=config.latent_channels,
            layers_per_block=config.layers_per_block,
            temporal_compression_ratio=config.temporal_compression_ratio,
            norm_num_groups=config.norm_num_groups,
            sample_height=config.height,
            sample_width=config.width,
            scaling_factor=1.0,
        )


def training_scenes(config: VAEConfig, step: int) -> list[np.ndarray]:
    """The rendered scenes of a step, B of uint8 (F, H, W, 3): a function of the seed and the step alone."""
    random = np.random.default_rng([config.seed, step])
    stories = [sample_story(int(seed)) for seed in random.integers(2**31, size=config.batch_size)]
    return [_render(config, story, int(random.integers(len(story.scenes)))) for story in stories]


def to_pixels(scenes: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """uint8 (F, H, W, 3) each, as the autoencoder takes them: float32 (B, 3, F, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(scenes)).to(device)
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(vae: AutoencoderKLCogVideoX, scenes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Scenes, uint8 (F, H, W, 3) each, through the autoencoder and back, one at a time as the pipeline takes them."""
    decoded = [
        vae.decode(vae.encode(to_pixels([scene], vae.device).to(vae.dtype)).latent_dist.mode()) for scene in scenes
    ]
    return [to_uint8((video.sample[0].float() / 2 + 0.5).permute(1, 2, 3, 0).cpu().numpy()) for video in decoded]


def psnr(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The peak signal-to-noise ratio in dB of uint8 scenes, a mean over scenes."""
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(expected, found)]
    return float(np.mean([10 * math.log10(255**2 / max(error, 1e-9)) for error in errors]))


@torch.no_grad()
def latent_std(vae: AutoencoderKLCogVideoX, batches: Sequence[Sequence[np.ndarray]]) -> float:
    """The standard deviation of the means of the posterior, over all latent elements of these scenes."""
    latents = [vae.encode(to_pixels(scenes, vae.device)).latent_dist.mode() for scenes in batches]
    return float(torch.cat(latents).float().std())


def _render(config: VAEConfig, story: Story, k: int) -> np.ndarray:
    return render_scene(story, k, num_frames=config.num_frames, height=config.height, width=config.width)


def _crop(config: VAEConfig, pixels: torch.Tensor, step: int) -> torch.Tensor:
    """A random part of pictures (…, H, W), the same of all in a step."""
    random = np.random.default_rng([config.seed, step, 1])
    top, left = (random.integers(size - config.crop + 1) for size in pixels.shape[-2:])
    return pixels[..., top : top + config.crop, left : left + config.crop]


def _check_size(config: VAEConfig, vae: AutoencoderKLCogVideoX) -> None:
    """Raises `ValueError` if latents do not come out even."""
    step = 2 ** (len(config.block_out_channels) - 1)
    for name in ("height", "width", "crop"):
        if getattr(config, name) % step:
            raise ValueError(f"{name}={getattr(config, name)} has to be a multiple of {step}")
    if config.crop > min(config.height, config.width):
        raise ValueError(f"crop={config.crop} has to fit in height={config.height} and width={config.width}")
    # From an even number of latent frames it would decode a few frames too many.
    group = int(2 * vae.config.temporal_compression_ratio)
    if config.num_frames % group != 1:
        raise ValueError(f"num_frames={config.num_frames} has to be 1 + {group}m, such as {1 + group}")


if __name__ == "__main__":
    sys.exit(run_command(VAEConfig, "mask2dit.storyworld.vae:train_vae", None, sys.argv[1:]))
