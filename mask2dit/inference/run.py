"""Generates the video of a configuration with its contact sheet and record, as the example scripts run it."""

import dataclasses
import hashlib
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

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from mask2dit.config import SAMPLERS, missing_model
from mask2dit.device import choose_device
from mask2dit.files import check_writable, move_new, write_errors, write_text
from mask2dit.hashing import fingerprint
from mask2dit.inference.config import InferenceConfig
from mask2dit.models.attention import check_attention_backend
from mask2dit.models.context_cache import FP8
from mask2dit.models.lora import check_lora
from mask2dit.models.masks import cross_scene
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline, VideoShape
from mask2dit.pipelines.memory import apply_memory_mode, check_memory_mode, enable_vae_tiling
from mask2dit.pipelines.story import (
    SceneStore,
    Window,
    check_context_refresh,
    check_continues,
    context_cache_size,
    decode_scene,
    generate_story,
    plan_windows,
)
from mask2dit.pipelines.untrained import build_untrained_model, is_untrained
from mask2dit.provenance import software
from mask2dit.storyworld.prompts import check_prompts
from mask2dit.texts import parse_json, read_text
from mask2dit.video.frames import resize_and_crop, to_uint8
from mask2dit.video.reading import choose_scene, open_video
from mask2dit.video.writing import contact_sheet, write_image, write_video

logger = logging.getLogger(__name__)

SHEET_COLUMNS = 6
SMALL = 256  # pixels; videos with a smaller shorter side are also written enlarged
STORY_OPTIONS = ("negative_prompt", "window", "noise_context", "height", "width", "num_frames", "num_inference_steps",
                 "guidance_scale", "use_dynamic_cfg", "context_refresh", "context_cache_device", "context_cache_dtype",
                 "seed")  # fmt: skip
"""Arguments of `generate_story` that are keys of the configuration."""


def generate(config: InferenceConfig) -> Path:
    """Generates the story of a configuration.

    Returns:
        The path of the mp4. Its folder also holds a contact sheet (.png), a record (.json) with which the run can be
        reproduced and, for a small video, an enlarged copy (for instance _4x.mp4).

    Raises:
        ValueError, FileNotFoundError, PermissionError: for invalid settings, files or folders, before weights are read.
    """
    started = time.time()
    device = choose_device(config.device)
    if config.build_untrained and Path(config.model).name.startswith("untrained"):
        build_untrained_model(config.model)
    plan = plan_generation(config, device)
    config, given = plan.config, plan.given
    untrained = is_untrained(config.model)
    if untrained:
        logger.warning("The model in %s is untrained: its pictures are noise and mean nothing.", config.model)

    for i, prompt in enumerate(config.prompts):
        logger.info("Scene %d%s: %s", i + 1, f" (given, {given[i]})" if i < len(given) else "", prompt)
    if config.context_refresh > 1:
        logger.info("%s", _describe_context_cache(plan))
    pipe = load_pipeline(config, device)
    identity = weights_identity(config)
    store = SceneStore(Path(config.save_path) / "scenes", identity)
    context_latents = _context(plan, pipe, store) if given else None
    scenes = list(story_latents(pipe, config, store, context_latents))

    sheet_rows, scene_frames = [], []

    def frames() -> Iterator[np.ndarray]:
        for i, latents in enumerate(tqdm(scenes, desc="decoding", unit="scene")):
            # Given scenes keep their own pixels instead of the VAE's reconstruction.
            video = given[i].frames if i < len(given) else decode_scene(pipe, latents, device)
            shown = np.linspace(0, len(video) - 1, min(SHEET_COLUMNS, len(video))).round().astype(int)
            sheet_rows.append(video[shown])
            scene_frames.append(len(video))
            yield from video

    with write_errors(config.save_path), tempfile.TemporaryDirectory(dir=config.save_path, prefix=".") as folder:
        made = Path(folder) / "video.mp4"
        factor = -(-SMALL // min(config.height, config.width))
        video = frames() if factor == 1 else list(frames())
        write_video(made, video, config.fps)
        if factor > 1:  # nearest neighbour keeps pixels visible
            large = (frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in video)
            write_video(made.with_stem(f"video_{factor}x"), large, config.fps)
        title = "untrained weights: these pictures mean nothing" if untrained else None
        sheet = contact_sheet(sheet_rows, config.prompts, columns=SHEET_COLUMNS, title=title, given=range(len(given)))
        write_image(made.with_suffix(".png"), sheet)
        record = _record(config, pipe, identity, given, scene_frames, device, time.time() - started)
        write_text(made.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        output = _place(made, config)
    logger.info("Wrote %s, its contact sheet (.png) and its record (.json)", output)
    if factor > 1:
        logger.info("It is small: for viewing, %s is enlarged by nearest neighbour", f"{output.stem}_{factor}x.mp4")
    return output


@dataclasses.dataclass(frozen=True)
class GivenScene:
    """A given scene, read from a context video."""

    path: str
    indices: list[int]
    """Indices of the frames in the file."""
    frames: np.ndarray
    """Frames as the model sees them: uint8 (num_frames, height, width, 3), resized and centre-cropped."""

    def __str__(self) -> str:
        return f"frames {self.indices[0]} to {self.indices[-1]} of {self.path}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """A checked configuration with the objects that its checks built."""

    config: InferenceConfig
    """The resolved configuration, with the model's size in place of null."""
    skeleton: Mask2DiTPipeline
    """The model without its weights."""
    shape: VideoShape
    """Frames and latent frames of the whole story."""
    windows: list[Window]
    """The scenes that are generated together."""
    given: list[GivenScene]
    """The given scenes, decoded from the context videos."""


def load_skeleton(model: str, small_config: str = "fixed_scene_small.yaml") -> Mask2DiTPipeline:
    """Builds the model without weights. Raises `FileNotFoundError`, naming a small model to use, if it is missing."""
    if not (Path(model) / "transformer").is_dir():
        raise FileNotFoundError(missing_model(model, f"configs/inference/{small_config}"))
    return Mask2DiTPipeline.skeleton(model)


def plan_generation(
    config: InferenceConfig, device: torch.device, skeleton: Mask2DiTPipeline | None = None
) -> InferencePlan:
    """Checks everything that can be checked without reading weights, and reads the context videos.

    Args:
        config: the configuration of the story.
        device: the device that the model will run on.
        skeleton: the result of `load_skeleton`, to share between stories. None: built here.

    Raises:
        ValueError, FileNotFoundError, PermissionError: for invalid settings, files or folders, with a remedy.
    """
    check_memory_mode(config.memory, device)
    if config.mask_variant is not None:
        cross_scene(config.mask_variant)
    if skeleton is None:
        skeleton = load_skeleton(
            config.model, "extension_small.yaml" if config.context_videos else "fixed_scene_small.yaml"
        )
    if config.attention_backend is not None:
        check_attention_backend(config.attention_backend, device)
    check_prompts(config.model, config.prompts, config.window)
    skeleton.check_steps(config.num_inference_steps)
    if config.vae_tiling:
        enable_vae_tiling(skeleton.vae)
    if config.lora.path:
        check_lora(config.lora.path, skeleton.transformer)
    size = skeleton.fill_size(config.height, config.width, config.num_frames)
    config = dataclasses.replace(config, **dict(zip(("height", "width", "num_frames"), size)))
    if config.context_videos:
        check_continues(config.window)
    windows = plan_windows(skeleton, len(config.prompts), range(len(config.context_videos)), config.window, *size)
    if config.name is not None and (Path(config.save_path) / f"{config.name}.mp4").exists():
        raise FileExistsError(
            f"{config.name}.mp4 is in {config.save_path!r} already: choose another name, or leave name out"
        )
    readers = [(video, open_video(video)) for video in config.context_videos]
    sources = [(video, reader, scene) for video, reader in readers for scene in _scenes_of(video, reader.num_frames)]
    if len(sources) > len(config.context_videos):
        windows = plan_windows(skeleton, len(config.prompts), range(len(sources)), config.window, *size)
    check_context_refresh(config.context_refresh, windows)
    shape = skeleton.video_shape(*size, len(config.prompts))
    generator = torch.Generator().manual_seed(config.seed)
    given = []
    for (video, reader, scene), num_frames in zip(sources, shape.frames):
        indices = choose_scene(scene, video, num_frames, start=config.context_start, generator=generator)
        pixels = resize_and_crop(reader.read(indices), config.height, config.width)
        given.append(
            GivenScene(video, indices, to_uint8(pixels.add(1).div(2).permute(0, 2, 3, 1).contiguous().numpy()))
        )
    check_writable(config.save_path)
    return InferencePlan(config=config, skeleton=skeleton, shape=shape, windows=windows, given=given)


def _describe_context_cache(plan: InferencePlan) -> str:
    """Describes the memory that the context cache of a plan takes."""
    config, skeleton = plan.config, plan.skeleton
    dtype = FP8 if config.context_cache_dtype == "fp8" else getattr(torch, config.dtype)
    variant = config.mask_variant or skeleton.transformer.config.mask_variant
    branch = context_cache_size(skeleton, plan.windows, plan.shape, dtype, variant)
    branches = 2 if config.guidance_scale > 1 else 1
    where = "in main memory" if config.context_cache_device == "cpu" else "on the transformer's device"
    return (
        f"context_refresh={config.context_refresh} keeps up to {branches * branch / 1e9:.3g} GB of keys and values {where} "
        f"({branch / 1e9:.3g} GB per guidance branch)"
    )


def _scenes_of(video: str, num_frames: int) -> list[range]:
    """Returns the frame indices of each scene in a context video: the scenes of its record, if it has one, else one scene."""
    record = Path(video).with_suffix(".json")
    if not record.is_file():
        return [range(num_frames)]
    try:
        scenes = [range(*scene["frames"]) for scene in parse_json(read_text(record, "record"))["scenes"]]
    except (ValueError, TypeError, KeyError):
        scenes = []
    if [frame for scene in scenes for frame in scene] != list(range(num_frames)):
        logger.warning("%s does not say where the scenes of %s lie, which is taken for one scene", record, video)
        return [range(num_frames)]
    if len(scenes) > 1:
        logger.info("%s holds %d scenes, as %s says: each of them is given", video, len(scenes), record.name)
    return scenes


def load_pipeline(config: InferenceConfig, device: torch.device) -> Mask2DiTPipeline:
    """Loads the pipeline of a configuration onto its device."""
    pipe = Mask2DiTPipeline.from_pretrained(
        config.model, mask_variant=config.mask_variant, torch_dtype=getattr(torch, config.dtype)
    )
    pipe.scheduler = getattr(diffusers, SAMPLERS[config.sampler]).from_config(pipe.scheduler.config)
    if config.lora.path:
        pipe.load_lora_weights(config.lora.path, adapter_name="lora")
        pipe.set_adapters("lora", config.lora.scale)
    if config.attention_backend:
        pipe.transformer.set_attention_backend(config.attention_backend)
    pipe.vae.enable_slicing()
    if config.vae_tiling:
        enable_vae_tiling(pipe.vae)
    apply_memory_mode(pipe, config.memory, device)
    if config.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def story_latents(
    pipe: Mask2DiTPipeline, config: InferenceConfig, store: SceneStore, context_latents: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Generates the story of a configuration by `generate_story`, continuing from the given scenes' latents, if any."""
    options = {name: getattr(config, name) for name in STORY_OPTIONS}
    return generate_story(pipe, config.prompts, context_latents=context_latents, store=store, **options)


def _context(plan: InferencePlan, pipe: Mask2DiTPipeline, store: SceneStore) -> torch.Tensor:
    """Encodes the given scenes, or finds their latents in the store. They are stored like generated scenes, since encoding
    on a GPU may differ in the last bit between runs, and the scenes that continue from them would not be found again."""
    config, given = plan.config, plan.given
    digests = [hashlib.sha256(scene.frames).hexdigest() for scene in given]
    frames = [len(scene.frames) for scene in given]
    num_latent_frames = sum(plan.shape.latent_frames[: len(given)])
    key = store.key(digests, frames, config.height, config.width, config.sample_context, config.seed, config.dtype)
    latents = store.load(key, (1, num_latent_frames, *plan.shape.latent_size))
    if latents is None:
        latents = pipe.encode_context(
            [[scene.frames for scene in given]],
            frames,
            config.height,
            config.width,
            sample_posterior=config.sample_context,
            generator=torch.Generator().manual_seed(config.seed),
        ).cpu()
        store.save(key, latents)
    return latents


def weights_identity(config: InferenceConfig) -> str:
    """Identifies the inputs of a scene that `generate_story` does not know: the weights and how they are computed with."""
    parts = [fingerprint(config.model), f"attention {config.attention_backend}", f"tiling {config.vae_tiling}"]
    if config.memory == "fp8":
        parts.append("fp8")
    if config.lora.path:
        parts.append(f"lora {fingerprint(config.lora.path)} * {config.lora.scale}")
    return ", ".join(parts)


def _place(made: Path, config: InferenceConfig) -> Path:
    """Moves a finished video, its sheet and its record to their names, while other runs may take names too.

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
    for file in made.parent.iterdir():
        file.replace(output.with_name(output.stem + file.name.removeprefix(made.stem)))
    return output


def _next_number(folder: Path) -> str:
    taken = [int(file.stem) for file in folder.glob("*.mp4") if re.fullmatch("[0-9]+", file.stem)]
    return f"{max(taken, default=0) + 1:05d}"


def _record(config, pipe, identity, given, scene_frames, device, seconds) -> dict:
    """Builds a video's record: the resolved configuration, the scenes, the software versions and the device."""
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
                "context": scene
                and {"path": scene.path, "fingerprint": fingerprint(scene.path), "indices": scene.indices},
            }
            for prompt, count, stop, scene in zip_longest(config.prompts, scene_frames, stops, given)
        ],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **software(),
        "seconds": round(seconds, 1),
    }
