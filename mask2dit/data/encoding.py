"""Encodes scenes and captions into inputs of the transformer.

Training and the cache call the same functions, with one clip or one caption at a time, since the last bits of a result may
depend on the rest of the batch.

Shapes: B samples, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene,
D text width.
"""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from mask2dit.models.loading import folder_variants, load_model, load_text_encoder
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.randomness import generator_for


def load_encoders(
    model: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device,
    skeleton: Mask2DiTPipeline | None = None,
    variant: str | None = None,
) -> Mask2DiTPipeline:
    """A pipeline with loaded VAE and text encoder, and a transformer without weights, which takes no memory.

    Args:
        model: the model's folder.
        dtype, device: data type and device of VAE and text encoder.
        skeleton: `Mask2DiTPipeline.skeleton` of the folder, which receives the encoders. None: built here.
        variant: the variant of the weights, as for `Mask2DiTPipeline.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as `Mask2DiTPipeline.skeleton` raises them.
    """
    pipe = Mask2DiTPipeline.skeleton(model) if skeleton is None else skeleton
    variants = folder_variants(Path(model), variant)
    vae = load_model(
        AutoencoderKLCogVideoX,
        AutoencoderKLCogVideoX.from_pretrained,
        Path(model) / "vae",
        variants["vae"],
        torch_dtype=dtype,
    )
    text_encoder = load_text_encoder(Path(model) / "text_encoder", dtype, variants["text_encoder"])
    pipe.register_modules(
        vae=vae.eval().requires_grad_(False).to(device), text_encoder=text_encoder.requires_grad_(False).to(device)
    )
    return pipe


@torch.no_grad()
def encode_clip(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE's posterior of one scene.

    Args:
        vae: the VAE, on any device.
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
        generator: a CPU generator, such as `generator_for(seed, epoch, position, "posterior")`, so that the noise is the
            same on every device.
        scaling_factor: the VAE's scaling factor.

    Returns:
        Latents with the shape, device and dtype of `mean`; computed in float32.
    """
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return ((mean.float() + torch.exp(0.5 * logvar.float()) * noise) * scaling_factor).to(mean.dtype)


def prepare_batch(
    pipe: Mask2DiTPipeline, batch: dict, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and embeddings of a batch for `diffusion_loss`, the same with a cache as without.

    Args:
        pipe: from `load_encoders`; for a batch from a cache, `Mask2DiTPipeline.skeleton` is enough.
        batch: from `mask2dit.data.datasets.collate`.
        seed: seed of the draw from the posterior, combined with each sample's epoch and position.
        device: device of the results.

    Returns:
        Scaled latents (B, S*F, C, h, w) and text embeddings (B, S*L, D).
    """
    if "pixels" in batch:
        posteriors = [[encode_clip(pipe.vae, scene) for scene in sample] for sample in batch["pixels"]]
        means, logvars = (torch.stack([torch.stack([p[i] for p in scenes]) for scenes in posteriors]) for i in (0, 1))
        embeddings = torch.stack(
            [torch.stack([encode_caption(pipe, caption) for caption in captions]) for captions in batch["captions"]]
        )
    else:
        means, logvars, embeddings = (batch[name] for name in ("latent_mean", "latent_logvar", "prompt_embeds"))
    latents = torch.stack(
        [
            sample_latents(mean, logvar, generator_for(seed, *position, "posterior"), pipe.vae.config.scaling_factor)
            for mean, logvar, *position in zip(means.to(device), logvars.to(device), batch["epoch"], batch["position"])
        ]
    )
    return latents.flatten(1, 2), embeddings.to(device).flatten(1, 2)
