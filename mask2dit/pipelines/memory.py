"""One setting for how a pipeline's weights share the device's memory, carried out by diffusers."""

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

MEMORY_MODES = {
    "full": "everything stays on the device: the fastest",
    "model_offload": "one component at a time on the device, the others in main memory",
    "group_offload": "block by block on the device, the next one copied while one computes",
    "sequential_offload": "layer by layer on the device: the least memory and by far the slowest",
    "fp8": "the transformer's weights stored in 8 bits and computed in the pipeline's dtype, with model_offload on a GPU",
}


def check_memory_mode(mode: str, device: torch.device | str) -> None:
    """Raises `ValueError` for an unknown mode, or one that this device cannot use."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory has to be one of {', '.join(MEMORY_MODES)}, but is {mode!r}")
    if torch.device(device).type == "cpu" and mode in ("model_offload", "group_offload", "sequential_offload"):
        raise ValueError(
            f"memory={mode} moves weights between main memory and a GPU, but the device is the CPU: use full"
        )


def apply_memory_mode(pipeline: DiffusionPipeline, mode: str, device: torch.device | str) -> None:
    """Places a freshly loaded pipeline on a device.

    Args:
        pipeline: with all weights in main memory.
        mode: a key of `MEMORY_MODES`.
        device: where it computes.

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
        # Part by part: the pipeline's own method would move a part that is left out of it to the device as a whole.
        pipeline.transformer.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
        )
        pipeline.vae.enable_group_offload(onload_device=device, offload_type="leaf_level")
        apply_group_offloading(pipeline.text_encoder, onload_device=device, offload_type="leaf_level")
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
