"""Scenes and captions as the transformer takes them. Training and the cache call the same functions, one clip and one caption
at a time, since the last bits of a result may depend on what else is in the batch.

Shapes: F latent frames of a scene, C latent channels, h x w latent size, L text tokens of a scene, D text width.
"""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from mask2dit.models.loading import load_model, load_text_encoder
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline


def load_encoders(model: str | os.PathLike, dtype: torch.dtype, device: torch.device) -> Mask2DiTPipeline:
    """A pipeline whose VAE and text encoder are loaded and whose transformer is an empty shell, which costs no memory.

    Raises:
        FileNotFoundError, ValueError: as `Mask2DiTPipeline.skeleton` raises them.
    """
    pipe = Mask2DiTPipeline.skeleton(model)
    vae = load_model(
        AutoencoderKLCogVideoX, AutoencoderKLCogVideoX.from_pretrained, Path(model) / "vae", torch_dtype=dtype
    )
    text_encoder = load_text_encoder(Path(model) / "text_encoder", dtype)
    pipe.register_modules(
        vae=vae.eval().requires_grad_(False).to(device), text_encoder=text_encoder.requires_grad_(False).to(device)
    )
    return pipe


@torch.no_grad()
def encode_clip(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE's posterior of one scene.

    Args:
        vae: on any device.
        pixels: (num_frames, 3, height, width) in [-1, 1].

    Returns:
        Mean and log-variance, (F, C, h, w) each, unscaled, on the VAE's device in its dtype.
    """
    posterior = vae.encode(pixels.transpose(0, 1)[None].to(vae.device, vae.dtype)).latent_dist
    return posterior.mean[0].transpose(0, 1).contiguous(), posterior.logvar[0].transpose(0, 1).contiguous()


@torch.no_grad()
def encode_caption(pipe: Mask2DiTPipeline, caption: str) -> torch.Tensor:
    """The embeddings of one caption, (L, D), on the text encoder's device in its dtype."""
    return pipe.encode_prompt([[caption]])[0, 0]


def sample_latents(
    mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator, scaling_factor: float
) -> torch.Tensor:
    """Draws scaled latents from the VAE's posterior.

    Args:
        mean, logvar: of any equal shape, such as (S, F, C, h, w).
        generator: a CPU one, such as `generator_for(seed, epoch, position, "posterior")`, so that every device draws the
            same.
        scaling_factor: the VAE's.

    Returns:
        The same shape, device and dtype as `mean`; computed in float32.
    """
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return ((mean.float() + torch.exp(0.5 * logvar.float()) * noise) * scaling_factor).to(mean.dtype)
