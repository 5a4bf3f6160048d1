"""What a generation needs, told from configurations alone: no weights are read, and none are fetched from the hub."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil
import torch

from mask2dit.config import missing_model
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.from_story import resolve_story
from mask2dit.inference.sources import read_kept_scenes
from mask2dit.models.context_cache import FP8
from mask2dit.models.hub import local_model, origin
from mask2dit.models.loading import empty_text_encoder, select_sampler
from mask2dit.pipelines.footprint import CARDS, GIB, Footprint, Step, count_steps, fits, predict_footprint
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline, VideoShape
from mask2dit.pipelines.parallel import check_parallel
from mask2dit.pipelines.step_cache import check_step_cache
from mask2dit.pipelines.story import ContextRule, Window, check_context_refresh, context_cache_size, plan_windows

SMALL_LATENTS = 2**16  # latents of a window, in one channel: about 4 million pixels of video
NAMES = {"text_encoder": "text encoder", "transformer": "transformer", "vae": "VAE"}


def check_sampling(config: InferenceConfig, skeleton: Mask2DiTPipeline) -> None:
    """Raises `ValueError` if the steps, the step cache, guidance and the processes do not go together or with the model."""
    skeleton.check_steps(config.num_inference_steps)
    check_step_cache(
        config.cache,
        config.cache_options,
        config.context_refresh,
        config.guidance_scale,
        config.guidance_interval,
        config.context_guidance,
    )
    parallel, heads = config.parallel, skeleton.transformer.config.num_attention_heads
    check_parallel(parallel.cfg, parallel.ulysses, heads, config.guidance_scale, config.memory)


def describe_needs(config: InferenceConfig, device: torch.device) -> str:
    """Describes the memory of every memory mode and the arithmetic of a run.

    Raises:
        ValueError, FileNotFoundError: if the model's configurations are missing, or a size is not supported.
    """
    config = local_model(config, configs_only=True)
    if not (Path(config.model) / "transformer").is_dir():
        raise FileNotFoundError(missing_model(config.model))
    skeleton = Mask2DiTPipeline.skeleton(config.model, configs_only=True)
    config, _ = resolve_story(config, skeleton)
    size = skeleton.fill_size(config.height, config.width, config.num_frames)
    shape = skeleton.video_shape(*size, len(config.prompts))
    given = _given_scenes(config)
    rule = ContextRule(config.context, tuple(config.anchors))
    windows = plan_windows(skeleton, config.prompts, given, config.window, *size, rule)
    check_sampling(config, skeleton)
    check_context_refresh(config.context_refresh, windows)
    footprint = predict(config, skeleton, shape, windows)
    name = origin(config.model).get("model", config.model)
    weights = ", ".join(f"{NAMES[part]} {sizes.total / GIB:.2f}" for part, sizes in footprint.weights.items())
    operations = ", ".join(f"{NAMES[part]} {flops:.2g}" for part, flops in footprint.flops.items())
    height, width, num_frames = size
    lines = [
        f"{name}, {config.dtype}; weights in GiB: {weights}",
        f"{len(config.prompts)} scenes ({len(given)} given) of {num_frames} frames at {height}x{width}, "
        f"{config.num_inference_steps} steps, windows of {', '.join(str(len(scenes)) for scenes, _ in windows)} scenes",
        f"floating-point operations: {sum(footprint.flops.values()):.3g} ({operations})",
    ]
    steps = _count_steps(config, skeleton)
    if any(not step.guided for step in steps) and config.guidance_scale > 1:
        guided = sum(count for step, count in steps.items() if step.guided)
        lines.append(f"guided steps: {guided} of {config.num_inference_steps}")
    if config.context_refresh > 1:
        complete = sum(count for step, count in steps.items() if step.complete)
        lines.append(f"steps that compute given scenes: {complete} of {config.num_inference_steps}")
    if config.cache is not None:
        lines.append(f"not counted: what cache={config.cache} saves, and the memory of what it keeps")
    if (num_processes := config.parallel.cfg * config.parallel.ulysses) > 1:
        lines.append(f"{num_processes} processes; operations and memory are those of one of them")
    if footprint.context_cache:
        lines.append(
            f"keys and values of given scenes that the context cache keeps: {footprint.context_cache / GIB:.2f} GiB"
        )
    lines += ["", f"{'memory':<20}{'GPU':>10}{'main memory':>14}   predicted peaks in GiB"]
    for mode in footprint.modes:
        on_gpu, in_main = footprint.on_gpu(mode) / GIB, footprint.in_main_memory(mode) / GIB
        lines.append(f"{mode:<20}{on_gpu:>10.1f}{in_main:>14.1f}")
    return "\n".join([*lines, "", *_recommendations(config, footprint, device)])


def predict(
    config: InferenceConfig, skeleton: Mask2DiTPipeline, shape: VideoShape, windows: Sequence[Window]
) -> Footprint:
    """Predicts the footprint of a configuration, whose model is a local folder.

    Args:
        config: the configuration.
        skeleton: its model without weights.
        shape: frames and latent frames of the whole story.
        windows: from `plan_windows`.
    """
    dtype = getattr(torch, config.dtype)
    kept = 0
    if config.context_refresh > 1:
        variant = config.mask_variant or skeleton.transformer.config.mask_variant
        kept_dtype = FP8 if config.context_cache_dtype == "fp8" else dtype
        branches = 2 if config.guidance_scale > 1 and config.parallel.cfg == 1 else 1  # on a process
        kept = branches * context_cache_size(skeleton, windows, shape, kept_dtype, variant)
        kept //= config.parallel.ulysses  # a process keeps its own heads
    return predict_footprint(
        skeleton,
        empty_text_encoder(Path(config.model) / "text_encoder"),
        shape,
        windows,
        dtype=dtype,
        steps=_count_steps(config, skeleton),
        cfg=config.parallel.cfg,
        ulysses=config.parallel.ulysses,
        context_guidance=config.context_guidance,
        vae_tiling=config.vae_tiling,
        quantization=config.quantization.components,
        context_cache=kept,
        context_cache_on_gpu=config.context_cache_device != "cpu",
    )


def _count_steps(config: InferenceConfig, skeleton: Mask2DiTPipeline) -> Counter[Step]:
    scheduler = select_sampler(skeleton.scheduler, config.sampler)
    scheduler.set_timesteps(config.num_inference_steps)
    return count_steps(
        scheduler.timesteps.tolist(), config.guidance_scale > 1, config.guidance_interval, config.context_refresh
    )


def check_fits(config: InferenceConfig, footprint: Footprint, device: torch.device) -> None:
    """Raises `ValueError` if the memory mode is predicted not to fit the device's memory, with the modes that do."""
    capacity, where = _capacity(device), "of this GPU" if device.type == "cuda" else "of main memory"
    peak = _peak(footprint, config.memory, device)
    is_enough = fits(peak, capacity) if device.type == "cuda" else peak <= capacity
    if not is_enough:
        raise ValueError(
            f"memory={config.memory} is predicted to take {peak / GIB:.1f} GiB, which does not fit the "
            f"{capacity / GIB:.1f} GiB {where}: {fitting_modes(config, footprint, device)}; check_memory=false tries it all "
            "the same"
        )


def is_worth_predicting(device: torch.device, shape: VideoShape, windows: Sequence[Window]) -> bool:
    """Returns False for small videos on a CPU, whose prediction takes longer than it is worth, and where nothing is
    generated."""
    height, width = shape.latent_size[1:]
    largest = max((sum(shape.latent_frames[scene] for scene in window.scenes) for window in windows), default=0)
    return bool(windows) and (device.type == "cuda" or largest * height * width >= SMALL_LATENTS)


def fitting_modes(config: InferenceConfig, footprint: Footprint, device: torch.device) -> str:
    """Names the memory modes that are predicted to fit a device, or other remedies."""
    capacity = _capacity(device)
    modes = footprint.fitting(capacity) if device.type == "cuda" else footprint.fitting_cpu(capacity)
    if modes:
        return "predicted to fit: " + ", ".join(
            f"memory={mode} ({_peak(footprint, mode, device) / GIB:.1f} GiB)" for mode in modes
        )
    tiles = "" if config.vae_tiling else " vae_tiling=true,"
    return f"no memory mode is predicted to fit: use{tiles} a smaller window, height, width or num_frames"


def _given_scenes(config: InferenceConfig) -> Collection[int]:
    if config.record:
        return read_kept_scenes(config)
    if config.scene_mask is not None:
        return [scene for scene, is_new in enumerate(config.scene_mask) if not is_new]
    return range(len(config.context_videos))


def _recommendations(config: InferenceConfig, footprint: Footprint, device: torch.device) -> list[str]:
    fitting = {f"{size} GB": footprint.fitting(int(size * 1e9)) for size in CARDS}
    if device.type == "cuda":
        fitting["this GPU"] = footprint.fitting(_capacity(device))
    else:
        fitting["this CPU"] = footprint.fitting_cpu(_capacity(device))
    lines = []
    for card, modes in fitting.items():
        remedy = "too small; vae_tiling=true or a smaller size may fit" if not config.vae_tiling else "too small"
        lines.append(f"{card:>9}: {f'memory={modes[0]}' if modes else remedy}")
    return lines


def _capacity(device: torch.device) -> int:
    """The bytes of a GPU's memory, or of main memory where the CPU computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _peak(footprint: Footprint, mode: str, device: torch.device) -> int:
    return footprint.on_gpu(mode) if device.type == "cuda" else footprint.on_cpu(mode)
