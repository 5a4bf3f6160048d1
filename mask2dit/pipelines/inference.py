"""From a configuration to a video file with its contact sheet and its record: what the example scripts run."""

import dataclasses
import json
import logging
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from tqdm import tqdm

from mask2dit.files import check_writable, move_new, write_errors, write_text
from mask2dit.models.loading import fingerprint, weight_files, weight_shapes
from mask2dit.models.masks import cross_scene
from mask2dit.pipelines.inference_config import InferenceConfig
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.memory import apply_memory_mode, check_memory_mode
from mask2dit.pipelines.story import SceneStore, check_story, generate_story
from mask2dit.pipelines.untrained import build_untrained_model, is_untrained
from mask2dit.provenance import git_commit, versions
from mask2dit.storyworld.prompts import check_prompts
from mask2dit.video.frames import to_uint8
from mask2dit.video.reading import read_scene
from mask2dit.video.writing import contact_sheet, write_image, write_video

logger = logging.getLogger(__name__)

CPU_BACKENDS = ("native", "_native_math", "flex")
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
SHEET_COLUMNS = 6


def generate(config: InferenceConfig) -> Path:
    """Generates the story of a configuration.

    Returns:
        The mp4. Beside it lie a contact sheet (.png) and a record (.json) with everything needed to make it again.

    Raises:
        ValueError, FileNotFoundError, PermissionError: for anything that cannot be carried out, before weights are read.
    """
    started = time.time()
    device = choose_device(config.device)
    if config.build_untrained and Path(config.model).name.startswith("untrained"):
        build_untrained_model(config.model)
    check(config, device)
    untrained = is_untrained(config.model)
    if untrained:
        logger.warning("The model in %s is untrained: its pictures are noise and mean nothing.", config.model)

    for i, prompt in enumerate(config.prompts):
        logger.info("Scene %d%s: %s", i + 1, " (given)" if i < len(config.context_videos) else "", prompt)
    pipe = load_pipeline(config, device)
    identity = weights_identity(config)
    store = SceneStore(Path(config.save_path) / "scenes", identity)
    context_latents = _context(config, pipe, store) if config.context_videos else None
    scenes = list(
        generate_story(
            pipe,
            config.prompts,
            negative_prompt=config.negative_prompt,
            window=config.window,
            context_latents=context_latents,
            noise_context=config.noise_context,
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            use_dynamic_cfg=config.use_dynamic_cfg,
            seed=config.seed,
            store=store,
        )
    )

    sheet_rows, scene_frames = [], []

    def frames() -> Iterator[np.ndarray]:
        for latents in tqdm(scenes, desc="decoding", unit="scene"):
            video = to_uint8(pipe.decode_latents(latents.to(device), [latents.shape[1]])[0])
            shown = np.linspace(0, len(video) - 1, min(SHEET_COLUMNS, len(video))).round().astype(int)
            sheet_rows.append(video[shown])
            scene_frames.append(len(video))
            yield from video

    with write_errors(config.save_path), tempfile.TemporaryDirectory(dir=config.save_path, prefix=".") as folder:
        made = Path(folder) / "video.mp4"
        write_video(made, frames(), config.fps)
        title = "untrained weights: these pictures mean nothing" if untrained else None
        sheet = contact_sheet(sheet_rows, config.prompts, columns=SHEET_COLUMNS, title=title)
        write_image(made.with_suffix(".png"), sheet)
        record = _record(config, pipe, identity, scene_frames, device, time.time() - started)
        write_text(made.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        output = _place(made, config)
    logger.info("Wrote %s, %s and %s", output, output.with_suffix(".png").name, output.with_suffix(".json").name)
    return output


def check(config: InferenceConfig, device: torch.device) -> None:
    """Everything that can be found wrong without reading weights, found before reading them.

    Raises:
        ValueError, FileNotFoundError, PermissionError: with what is wrong and what would be right.
    """
    check_memory_mode(config.memory, device)
    if config.mask_variant is not None:
        cross_scene(config.mask_variant)
    if not (Path(config.model) / "transformer").is_dir():
        small = "extension_small.yaml" if config.context_videos else "fixed_scene_small.yaml"
        raise FileNotFoundError(
            f"there is no model in {str(Path(config.model).resolve())!r}: put the weights there (models/README.md says "
            f"which), or run the small world's model with configs/inference/{small}, which comes with the repository"
        )
    if config.attention_backend is not None:
        _check_attention_backend(config.attention_backend, device)
    check_prompts(config.model, config.prompts, config.window)
    skeleton = Mask2DiTPipeline.skeleton(config.model)
    skeleton.check_steps(config.num_inference_steps)
    if config.lora.path:
        _check_lora(config.lora.path, skeleton)
    num_given = len(config.context_videos)
    check_story(
        skeleton, len(config.prompts), num_given, config.window, config.height, config.width, config.num_frames
    )
    if config.name is not None and (Path(config.save_path) / f"{config.name}.mp4").exists():
        raise FileExistsError(
            f"{config.name}.mp4 is in {config.save_path!r} already: choose another name, or leave name out"
        )
    frames, _, _ = skeleton.check_size(config.height, config.width, config.num_frames, len(config.prompts))
    for video, num_frames in zip(config.context_videos, frames):
        read_scene(video, num_frames, config.height, config.width)
    check_writable(config.save_path)


def load_pipeline(config: InferenceConfig, device: torch.device) -> Mask2DiTPipeline:
    """The pipeline of a configuration on its device."""
    pipe = Mask2DiTPipeline.from_pretrained(
        config.model, mask_variant=config.mask_variant, torch_dtype=getattr(torch, config.dtype)
    )
    pipe.scheduler = SCHEDULERS[config.sampler].from_config(pipe.scheduler.config)
    if config.lora.path:
        pipe.load_lora_weights(config.lora.path, adapter_name="lora")
        pipe.set_adapters("lora", config.lora.scale)
    if config.attention_backend:
        pipe.transformer.set_attention_backend(config.attention_backend)
    pipe.vae.enable_slicing()
    if config.vae_tiling:
        pipe.vae.enable_tiling()
    apply_memory_mode(pipe, config.memory, device)
    if config.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def _context(config: InferenceConfig, pipe: Mask2DiTPipeline, store: SceneStore) -> torch.Tensor:
    """Latents of the given scenes. They are kept like generated ones, since encoding on a GPU may differ in the last bit
    from run to run, and what continues from them would then not be found again."""
    frames, _, _ = pipe.check_size(config.height, config.width, config.num_frames, len(config.prompts))
    frames = frames[: len(config.context_videos)]
    files = [fingerprint(video) for video in config.context_videos]
    how = {"start": config.context_start, "sample_posterior": config.sample_context}
    key = store.key(files, frames, config.height, config.width, how, config.seed, config.dtype)
    latents = store.load(key)
    if latents is None:
        generator = torch.Generator().manual_seed(config.seed)
        latents = pipe.encode_context(
            [config.context_videos], frames, config.height, config.width, generator=generator, **how
        ).cpu()
        store.save(key, latents)
    return latents


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU if there is one. Raises `ValueError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device has to be auto, cpu, cuda or cuda:1, but is {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch finds no GPU: use device=cpu, or install torch for CUDA")
    return device


def weights_identity(config: InferenceConfig) -> str:
    """Names all that a scene is made with beside what `generate_story` knows: weights, and what computes with them."""
    parts = [fingerprint(config.model), f"attention {config.attention_backend}", f"tiling {config.vae_tiling}"]
    if config.memory == "fp8":
        parts.append("fp8")
    if config.lora.path:
        parts.append(f"lora {fingerprint(config.lora.path)} * {config.lora.scale}")
    return ", ".join(parts)


def _check_attention_backend(name: str, device: torch.device) -> None:
    """Raises `ValueError` for a backend that is unknown, not installed, or not for this device."""
    backends = sorted(backend.value for backend in AttentionBackendName)
    if name not in backends:
        raise ValueError(f"attention_backend has to be one of {', '.join(backends)}, but is {name!r}")
    if device.type == "cpu" and name not in CPU_BACKENDS:
        raise ValueError(f"attention_backend={name} needs a GPU: on a CPU use {', '.join(CPU_BACKENDS)} or null")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise ValueError(f"attention_backend={name} cannot be used here: {error}") from error


def _check_lora(path: str, skeleton: Mask2DiTPipeline) -> None:
    """Raises `FileNotFoundError` or `ValueError` if there is no LoRA, or none for this transformer."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no LoRA {path!r}: name a .safetensors file or the folder of one")
    files = weight_files(Path(path)) if Path(path).is_dir() else [Path(path)]
    modules = {name for name, _ in skeleton.transformer.named_modules()}
    names = [name.removeprefix("transformer.").split(".lora")[0] for file in files for name in weight_shapes(file)]
    if not modules & set(names):
        raise ValueError(
            f"the LoRA {path!r} has weights for {names[0] if names else 'nothing'}, not for this transformer"
        )


def _place(made: Path, config: InferenceConfig) -> Path:
    """Gives a video that is whole, its sheet and its record their names, of which other runs may take some meanwhile.

    Raises:
        FileExistsError: if another run took the name that the configuration asks for.
    """
    folder = Path(config.save_path)
    while True:
        output = folder / f"{config.name or _next_number(folder)}.mp4"
        try:
            move_new(made, output)
            break
        except FileExistsError:
            if config.name is not None:
                raise
    for suffix in (".png", ".json"):
        made.with_suffix(suffix).replace(output.with_suffix(suffix))
    return output


def _next_number(folder: Path) -> str:
    taken = [int(file.stem) for file in folder.glob("*.mp4") if re.fullmatch("[0-9]+", file.stem)]
    return f"{max(taken, default=0) + 1:05d}"


def _record(config, pipe, identity, scene_frames, device, seconds) -> dict:
    """What made a video: the resolved configuration, its scenes, and the versions and device it was made with."""
    stops = np.cumsum(scene_frames).tolist()
    return {
        "config": dataclasses.asdict(config),
        "command": shlex.join(sys.argv),
        "weights": identity,
        "mask_variant": pipe.transformer.config.mask_variant,
        "scheduler": {"class": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        "scenes": [
            {
                "prompt": prompt,
                "frames": [stop - count, stop],
                "context": video and {"path": video, "fingerprint": fingerprint(video)},
            }
            for prompt, count, stop, video in zip_longest(config.prompts, scene_frames, stops, config.context_videos)
        ],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "git_commit": git_commit(),
        "seconds": round(seconds, 1),
    }
