"""Memory modes: where a pipeline's weights are kept and in which dtype, by diffusers' offloading and casting."""

import math

import torch
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
from diffusers.hooks import apply_group_offloading

MEMORY_MODES = {
    "full": "everything stays on the device: the fastest",
    "model_offload": "one component at a time on the device, the others in main memory",
    "group_offload": "block by block on the device, the next one copied while one computes",
    "sequential_offload": "layer by layer on the device: the least memory and by far the slowest",
    "fp8": "the transformer's weights stored in 8 bits and computed in the pipeline's dtype, with model_offload on a GPU",
}


def enable_vae_tiling(vae: AutoencoderKLCogVideoX) -> None:
    """Enables encoding and decoding in overlapping tiles of half the VAE's base size.

    diffusers rounds overlaps in pixels and in latents separately, and the results agree only at CogVideoX's base size. For
    other sizes, the next larger overlap for which they agree is used.

    Raises:
        ValueError: if the VAE's base size is too small for tiles that overlap.
    """
    scale = _spatial_scale(vae)
    tile = {}
    for axis in ("height", "width"):
        size, factor = (getattr(vae, f"tile_{name}_{axis}") for name in ("sample_min", "overlap_factor"))
        latents = size // scale
        overlaps = [factor, *(n / latents for n in range(math.ceil(latents * factor), latents))]
        fitting = [overlap for overlap in overlaps if _tiles_agree(latents * scale, latents, overlap, scale)]
        if not fitting:
            raise ValueError(
                f"the VAE's base {axis} of {vae.config[f'sample_{axis}']} pixels is too small for tiles of half of it: leave "
                "vae_tiling out"
            )
        tile[f"tile_sample_min_{axis}"], tile[f"tile_overlap_factor_{axis}"] = latents * scale, fitting[0]
    vae.enable_tiling(**tile)


def check_vae_tiles(vae: AutoencoderKLCogVideoX) -> None:
    """Raises `ValueError` if tiling is enabled with tiles that would change the size of videos."""
    for axis in ("height", "width") if vae.use_tiling else ():
        names = ("sample_min", "latent_min", "overlap_factor")
        size, latents, factor = (getattr(vae, f"tile_{name}_{axis}") for name in names)
        if not _tiles_agree(size, latents, factor, _spatial_scale(vae)):
            raise ValueError(
                f"VAE tiles of {axis} {size} ({latents} latents) with an overlap of {factor:.3g} would change the size of "
                "videos: use mask2dit.pipelines.memory.enable_vae_tiling(pipe.vae) or pipe.vae.disable_tiling()"
            )


def _spatial_scale(vae: AutoencoderKLCogVideoX) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _tiles_agree(size: int, latents: int, factor: float, scale: int) -> bool:
    """Returns True if the kept part of each tile is as long as the step to the next tile, by the rounding of diffusers'
    `tiled_encode` and `tiled_decode`."""
    step = int(latents * (1 - factor))
    kept_pixels, kept_latents = size - int(size * factor), latents - int(latents * factor)
    return step > 0 and step * scale == kept_pixels == int(size * (1 - factor)) and step == kept_latents


def check_memory_mode(mode: str, device: torch.device | str) -> None:
    """Raises `ValueError` for an unknown mode, or one that the device does not support."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory has to be one of {', '.join(MEMORY_MODES)}, but is {mode!r}")
    if torch.device(device).type == "cpu" and mode in ("model_offload", "group_offload", "sequential_offload"):
        raise ValueError(
            f"memory={mode} moves weights between main memory and a GPU, but the device is the CPU: use full"
        )


def apply_memory_mode(pipeline: DiffusionPipeline, mode: str, device: torch.device | str) -> None:
    """Places a freshly loaded pipeline on a device.

    Args:
        pipeline: the pipeline, with all weights in main memory.
        mode: a key of `MEMORY_MODES`.
        device: the device that it computes on.

    Raises:
        ValueError: as `check_memory_mode`.
    """
    check_memory_mode(mode, device)
    device = torch.device(device)
    if mode == "fp8":
        pipeline.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.transformer.dtype
        )
    if mode == "full" or (mode == "fp8" and device.type == "cpu"):
        pipeline.to(device)
    elif mode in ("model_offload", "fp8"):
        pipeline.enable_model_cpu_offload(device=device)
    elif mode == "group_offload":
        # Separately for each part: the pipeline's own method would move an excluded part to the device as a whole.
        pipeline.transformer.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
        )
        pipeline.vae.enable_group_offload(onload_device=device, offload_type="leaf_level")
        if pipeline.text_encoder is not None:  # it is left out where all prompts are in a cache
            apply_group_offloading(pipeline.text_encoder, onload_device=device, offload_type="leaf_level")
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
