"""Generates the video of a configuration with its contact sheet and record, as the example scripts run it."""

import dataclasses
import hashlib
import logging
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mask2dit.config import missing_model
from mask2dit.device import choose_device
from mask2dit.files import check_writable
from mask2dit.hashing import fingerprint
from mask2dit.inference.config import InferenceConfig, ParallelConfig
from mask2dit.inference.dry_run import (
    check_fits,
    check_sampling,
    describe_needs,
    fitting_modes,
    is_worth_predicting,
    predict,
)
from mask2dit.inference.from_story import resolve_story, seed_of
from mask2dit.inference.output import STORE, StoryFiles, check_name, claim_output, comparison_sheet
from mask2dit.inference.sources import (
    GivenScene,
    KeptScene,
    open_context_videos,
    read_given_scene,
    read_kept_scenes,
    without_old_seeds,
)
from mask2dit.models.attention import check_attention_backend
from mask2dit.models.context_cache import FP8
from mask2dit.models.hub import local_lora, local_model, recorded
from mask2dit.models.loading import empty_model, select_sampler
from mask2dit.models.lora import check_lora
from mask2dit.models.masks import cross_scene
from mask2dit.models.quantization import check_quantization
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.events import Event, Observer, PreviewMade, SceneFinished, ignore
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline, VideoShape
from mask2dit.pipelines.memory import apply_memory_mode, check_memory_mode, enable_vae_tiling
from mask2dit.pipelines.parallel import ALONE, Processes, SharedStore, local_device, start_processes
from mask2dit.pipelines.prompt_cache import PromptCache, text_settings
from mask2dit.pipelines.story import (
    ContextRule,
    SceneStore,
    Window,
    check_context_refresh,
    check_continues,
    context_cache_size,
    generate_story,
    plan_windows,
)
from mask2dit.pipelines.untrained import build_untrained_model, is_untrained
from mask2dit.provenance import software
from mask2dit.randomness import generator_for
from mask2dit.stories import Story
from mask2dit.storyworld.prompts import check_prompts

logger = logging.getLogger(__name__)

STORY_OPTIONS = ("negative_prompt", "window", "context", "anchors", "noise_context", "height", "width", "num_frames",
                 "num_inference_steps", "guidance_scale", "use_dynamic_cfg", "context_refresh",
                 "context_cache_device", "context_cache_dtype", "guidance_interval", "context_guidance", "cache",
                 "cache_options", "seed")  # fmt: skip
"""Arguments of `generate_story` that are keys of the configuration."""


def generate(config: InferenceConfig, observer: Observer = ignore) -> Path | None:
    """Generates the story of a configuration.

    Args:
        config: the configuration.
        observer: called with the events of `mask2dit.pipelines.events`.

    Returns:
        The path of the mp4, or of the first of several (`count`). `mask2dit.inference.output` lists the files beside it. None
        for a dry run.

    Raises:
        ValueError, FileNotFoundError, PermissionError: for invalid settings, files or folders, before weights are read.
        MemoryError: if the memory does not suffice, with the memory modes that are predicted to fit.
    """
    device = local_device(choose_device(config.device))
    parallel = ParallelConfig() if config.dry_run else config.parallel  # a dry run needs one process only
    with start_processes(parallel.cfg, parallel.ulysses, device) as processes:
        return _generate(config, device, processes, observer)


def _generate(config: InferenceConfig, device: torch.device, processes: Processes, observer: Observer) -> Path:
    """Generates the story of a configuration on processes that have started."""
    if processes.is_main and config.build_untrained and Path(config.model).name.startswith("untrained"):
        build_untrained_model(config.model)
    processes.from_main(None)  # the model is there
    if config.dry_run:
        print(describe_needs(config, device))
        return None
    plan = plan_generation(config, device)
    processes.wait()  # all have checked that the name is free, before the first one takes it
    for i, prompt in enumerate(plan.config.prompts):
        logger.info("Scene %d%s: %s", i + 1, f" ({plan.sources[i]})" if i in plan.sources else "", prompt)
    if plan.config.context_refresh > 1:
        logger.info("%s", _describe_context_cache(plan))
    first = seed_of(plan.config)
    seeds = range(first, first + config.count)
    with modes_named(plan, device):
        model = load_model(plan.config, device, processes)
        outputs = [render(plan.with_seed(seed), model, observer) for seed in seeds]
    if len(outputs) > 1 and processes.is_main:
        logger.info("Wrote %s, which compares the seeds", comparison_sheet(outputs, seeds))
    return outputs[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """A checked configuration with the objects that its checks built."""

    config: InferenceConfig
    """The resolved configuration, with the model's size in place of null, and a story's prompts in place of its file."""
    story: Story | None
    """The story of `config.story`."""
    skeleton: Mask2DiTPipeline
    """The model without its weights."""
    shape: VideoShape
    """Frames and latent frames of the whole story."""
    windows: list[Window]
    """Windows, as `story_windows` returns them."""
    sources: Mapping[int, GivenScene | KeptScene]
    """The scenes, by index, that are not generated."""

    def with_seed(self, seed: int) -> "InferencePlan":
        """Returns the plan of one video with this seed."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, seed=seed, count=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A pipeline on its device."""

    pipe: Mask2DiTPipeline
    device: torch.device
    identity: str
    """Identity of the weights, as `weights_identity` returns it."""
    processes: Processes = ALONE
    """The processes that share its work."""


def load_model(config: InferenceConfig, device: torch.device, processes: Processes = ALONE) -> LoadedModel:
    """Loads the model of a configuration."""
    if is_untrained(config.model):
        logger.warning("The model in %s is untrained: its pictures are noise and mean nothing.", config.model)
    pipe = load_pipeline(config, device)
    processes.apply(pipe)
    return LoadedModel(pipe=pipe, device=device, identity=weights_identity(config), processes=processes)


def render(plan: InferencePlan, model: LoadedModel, observer: Observer = ignore) -> Path:
    """Generates the story of a plan with the model that it was made for. Returns the path of the mp4, on every process.

    Each scene is written as soon as it is done. If the run does not end well, its files are removed; finished scenes stay in
    the store, from which the next run takes them.

    Raises:
        OSError: if the disk is full.
        FloatingPointError: for a scene that is not finite.
    """
    started = time.time()
    config, processes = plan.config, model.processes
    store = SharedStore(Path(config.save_path) / STORE, model.identity, processes)
    if not processes.is_main:
        for _ in make_scenes(plan, model, store):
            pass  # takes part, and writes nothing
        return processes.from_main(None)
    with claim_output(config) as files:

        def observe(event: Event) -> None:
            if isinstance(event, PreviewMade):
                files.write_preview(event.scene, event.image)
            observer(event)

        watch = observe if config.preview_every or observer is not ignore else ignore
        entries = []
        for i, scene in enumerate(make_scenes(plan, model, store, watch)):
            if isinstance(scene.source, KeptScene):
                clip = files.keep_scene(scene.source)
            else:
                clip = files.add_scene(scene.frames, scene.latents)
            entries.append(_scene_record(i, plan, files, scene))
            observer(SceneFinished(i, clip, scene.origin))
        untrained = is_untrained(config.model)
        title = "untrained weights: these pictures mean nothing" if untrained else None
        marked = [i for i, entry in enumerate(entries) if entry["context"]]
        record = {**describe_run(plan, model), "scenes": entries, "seconds": round(time.time() - started, 1)}
        files.finish(marked, title, record)
    logger.info("Wrote %s, its scenes, its contact sheet (.png) and its record (.json)", files.output)
    if files.enlarged:
        logger.info("It is small: for viewing, %s is enlarged by nearest neighbour", files.enlarged.name)
    return processes.from_main(files.output)


@dataclasses.dataclass(frozen=True)
class MadeScene:
    """A scene of a story that is being made."""

    source: GivenScene | KeptScene | None
    """Where it is from if it is not generated."""
    latents: torch.Tensor
    """Scaled latents, (1, F, C, h, w)."""
    frames: np.ndarray | None
    """uint8 (frames, H, W, 3); None for a kept scene, whose file has them, and on processes that do not write."""

    @property
    def origin(self) -> str:
        """How it was made: "generated", "given" or "kept"."""
        return {GivenScene: "given", KeptScene: "kept"}.get(type(self.source), "generated")


def make_scenes(
    plan: InferencePlan, model: LoadedModel, store: SceneStore, observer: Observer = ignore
) -> Iterator[MadeScene]:
    """Makes the scenes of a plan, in order, each as soon as it is done.

    Args:
        plan: the plan.
        model: the model that it was made for.
        store: keeps the latents of given scenes, and those of finished ones for an interrupted run.
        observer: called with the events of `mask2dit.pipelines.events`, but for `SceneFinished`.

    Raises:
        FloatingPointError: for a scene that is not finite.
    """
    config = plan.config
    given = {i: _latents_of(i, plan, model, store) for i in plan.sources}
    if len(given) == len(config.prompts):
        of_scenes = (given[i] for i in sorted(given))
    else:
        options = {"given": given, "observer": observer, "preview_every": config.preview_every}
        of_scenes = story_latents(model.pipe, config, store, **options)
    for i, (latents, frames) in enumerate(_decoded(plan, model, of_scenes)):
        source = plan.sources.get(i)
        if isinstance(source, GivenScene):  # keeps its own pixels instead of the VAE's reconstruction
            frames = source.frames
        yield MadeScene(source, latents, frames)


def _decoded(
    plan: InferencePlan, model: LoadedModel, scenes: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, np.ndarray | None]]:
    """Yields the latents of each scene with its frames, None for a scene that is not generated. Several processes decode the
    scenes of a window together; only the first one gets the frames."""
    processes = model.processes
    last_ones = {max(window.new) for window in plan.windows}
    waiting: dict[int, torch.Tensor] = {}
    for i, latents in enumerate(scenes):
        waiting[i] = latents
        if processes.size > 1 and i not in last_ones and i + 1 < len(plan.config.prompts):
            continue
        new = [scene for scene in waiting if scene not in plan.sources]
        decoded = processes.decode(model.pipe, [waiting[scene] for scene in new], model.device)
        frames = dict(zip(new, decoded, strict=True))
        for scene, its_latents in waiting.items():
            yield its_latents, frames.get(scene)
        waiting = {}


@contextmanager
def modes_named(plan: InferencePlan, device: torch.device) -> Generator[None]:
    """Adds the memory modes that are predicted to fit to an error of too little memory, on the GPU or the CPU."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, but the CPU has no error of its own
        if (
            not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error))
            or not plan.windows
        ):
            raise
        config = plan.config
        footprint = predict(config, plan.skeleton, plan.shape, plan.windows)
        reason = str(error).splitlines()[0].rstrip(".")
        raise MemoryError(f"{reason}; {fitting_modes(config, footprint, device)}") from error


def load_skeleton(
    model: str, small_config: str = "fixed_scene_small.yaml", variant: str | None = None
) -> Mask2DiTPipeline:
    """Builds the model without weights. Raises `FileNotFoundError`, naming a small model to use, if it is missing."""
    if not (Path(model) / "transformer").is_dir():
        raise FileNotFoundError(missing_model(model, f"configs/inference/{small_config}"))
    return Mask2DiTPipeline.skeleton(model, variant=variant)


def plan_generation(
    config: InferenceConfig,
    device: torch.device,
    skeleton: Mask2DiTPipeline | None = None,
    sources: Mapping[int, GivenScene | KeptScene] | None = None,
) -> InferencePlan:
    """Checks everything that can be checked without reading weights, and reads the context videos.

    Args:
        config: the configuration of the story.
        device: the device that the model will run on.
        skeleton: the result of `load_skeleton`, to share between stories. None: built here.
        sources: the scenes, by index, that are not generated. None: those that the configuration names.

    Raises:
        ValueError, FileNotFoundError, PermissionError: for invalid settings, files or folders, with a remedy.
    """
    check_memory_mode(config.memory, device)
    for form in config.quantization.components.values():
        check_quantization(form, device, config.memory)
    config = local_model(config)
    if config.mask_variant is not None:
        cross_scene(config.mask_variant)
    if skeleton is None:
        skeleton = load_skeleton(
            config.model, "extension_small.yaml" if config.context_videos else "fixed_scene_small.yaml", config.variant
        )
    config, story = resolve_story(config, skeleton)
    if config.attention_backend is not None:
        check_attention_backend(config.attention_backend, device)
    check_prompts(config.model, config.prompts, config.window)
    check_sampling(config, skeleton)
    if config.vae_tiling:
        enable_vae_tiling(skeleton.vae)
    config = local_lora(config)
    if config.lora.path:
        check_lora(config.lora.path, skeleton.transformer)
    size = skeleton.fill_size(config.height, config.width, config.num_frames)
    config = dataclasses.replace(config, **dict(zip(("height", "width", "num_frames"), size)))
    check_name(config)
    shape = skeleton.video_shape(*size, len(config.prompts))
    if sources is None and config.record:
        sources, config = read_kept_scenes(config), without_old_seeds(config)
    elif sources is None:
        sources = _given_scenes(config, skeleton, size)
    rule = ContextRule(config.context, tuple(config.anchors))
    is_whole = not config.record and len(sources) == len(config.prompts)
    windows = [] if is_whole else plan_windows(skeleton, config.prompts, sources, config.window, *size, rule)
    check_context_refresh(config.context_refresh, windows)
    if config.prompt_cache is not None:
        check_writable(config.prompt_cache)
    if config.check_memory and is_worth_predicting(device, shape, windows):
        check_fits(config, predict(config, skeleton, shape, windows), device)
    check_writable(config.save_path)
    return InferencePlan(config=config, story=story, skeleton=skeleton, shape=shape, windows=windows, sources=sources)


def _describe_context_cache(plan: InferencePlan) -> str:
    """Describes the memory that the context cache of a plan takes."""
    config, skeleton = plan.config, plan.skeleton
    dtype = FP8 if config.context_cache_dtype == "fp8" else getattr(torch, config.dtype)
    variant = config.mask_variant or skeleton.transformer.config.mask_variant
    branch = context_cache_size(skeleton, plan.windows, plan.shape, dtype, variant) / config.parallel.ulysses
    branches = 2 if config.guidance_scale > 1 and config.parallel.cfg == 1 else 1
    where = "in main memory" if config.context_cache_device == "cpu" else "on the transformer's device"
    return (
        f"context_refresh={config.context_refresh} keeps up to {branches * branch / 1e9:.3g} GB of keys and values {where} "
        f"({branch / 1e9:.3g} GB per guidance branch)"
    )


def _given_scenes(config: InferenceConfig, skeleton: Mask2DiTPipeline, size: tuple) -> dict[int, GivenScene]:
    """Reads the given scenes, after checking that the story has room for them."""
    if not config.context_videos:
        _given_indices(config, 0)
        return {}
    check_continues(config.window)
    plan_windows(skeleton, config.prompts, _given_indices(config, len(config.context_videos)), config.window, *size)
    scenes = open_context_videos(config.context_videos)
    given = _given_indices(config, len(scenes))
    plan_windows(skeleton, config.prompts, given, config.window, *size)
    generator = torch.Generator().manual_seed(seed_of(config))
    frames = skeleton.video_shape(*size, len(config.prompts)).frames
    return {i: read_given_scene(scene, frames[i], config, generator) for i, scene in zip(given, scenes)}


def _given_indices(config: InferenceConfig, num_given: int) -> Sequence[int]:
    """Returns the indices of the given scenes. Raises `ValueError` unless the mask gives as many as there are."""
    if config.scene_mask is None:
        return range(num_given)
    given = [i for i, new in enumerate(config.scene_mask) if not new]
    if len(given) != num_given:
        raise ValueError(
            f"{len(given)} scenes are marked as given, but the context videos hold {num_given}: name one file per scene, "
            "and a generated video with its record (.json) beside it holds all scenes of the record"
        )
    return given


def load_pipeline(config: InferenceConfig, device: torch.device) -> Mask2DiTPipeline:
    """Loads the pipeline of a configuration onto its device, without the text encoder if a cache holds all prompts."""
    cache = open_prompt_cache(config)
    is_complete = cache is not None and not cache.missing(_texts(config))
    without = {"text_encoder": None} if is_complete else {}
    pipe = Mask2DiTPipeline.from_pretrained(
        config.model,
        mask_variant=config.mask_variant,
        torch_dtype=getattr(torch, config.dtype),
        variant=config.variant,
        quantization=config.quantization.components,
        **without,
    )
    pipe.prompt_cache = cache
    pipe.scheduler = select_sampler(pipe.scheduler, config.sampler)
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


def open_prompt_cache(config: InferenceConfig) -> PromptCache | None:
    """Returns the cache of prompts' embeddings, or None if there is none."""
    if config.prompt_cache is None:
        return None
    model = empty_model(Mask2DiTTransformer3DModel, Path(config.model) / "transformer").config
    settings = text_settings(config.model, config.dtype, model.max_text_seq_length, config.variant)
    if config.quantization.text_encoder:
        settings["quantization"] = config.quantization.text_encoder
    return PromptCache(config.prompt_cache, settings, (model.max_text_seq_length, model.text_embed_dim))


def _texts(config: InferenceConfig) -> list[str]:
    """Returns all texts that a story needs embeddings of."""
    negatives = config.negative_prompt if isinstance(config.negative_prompt, list) else [config.negative_prompt]
    return [*config.prompts, *(negatives if config.guidance_scale > 1 else [])]


def story_latents(
    pipe: Mask2DiTPipeline, config: InferenceConfig, store: SceneStore, **options
) -> Iterator[torch.Tensor]:
    """Generates the story of a configuration by `generate_story`, to which the options are passed on."""
    of_config = {name: getattr(config, name) for name in STORY_OPTIONS} | {"seeds": config.scene_seeds}
    return generate_story(pipe, config.prompts, store=store, **of_config, **options)


def _latents_of(i: int, plan: InferencePlan, model: LoadedModel, store: SceneStore) -> torch.Tensor:
    """Returns the latents of a scene that is not generated. Those of given scenes are stored like generated ones, since
    encoding on a GPU may differ in the last bit between runs, and the scenes that continue from them would not be found."""
    config, scene = plan.config, plan.sources[i]
    shape = (1, plan.shape.latent_frames[i], *plan.shape.latent_size)
    if isinstance(scene, KeptScene):
        return scene.load_latents(shape)
    key = store.key(
        hashlib.sha256(scene.frames).hexdigest(), shape, config.sample_context, seed_of(config), config.dtype
    )
    latents = store.load(key, shape)
    if latents is None:
        latents = model.pipe.encode_context(
            [[scene.frames]],
            [len(scene.frames)],
            config.height,
            config.width,
            sample_posterior=config.sample_context,
            generator=generator_for(seed_of(config), "context", i),
        ).cpu()
        latents = model.processes.from_main(latents)
        store.save(key, latents)
    return latents


def weights_identity(config: InferenceConfig) -> str:
    """Identifies the inputs of a scene that `generate_story` does not know: the weights and how they are computed with."""
    parts = [fingerprint(config.model), f"attention {config.attention_backend}", f"tiling {config.vae_tiling}"]
    if config.variant:
        parts.append(f"variant {config.variant}")
    parts += [f"{name} in {form}" for name, form in config.quantization.components.items()]
    if config.memory == "fp8":
        parts.append("fp8")
    if config.lora.path:
        parts.append(f"lora {fingerprint(config.lora.path)} * {config.lora.scale}")
    return ", ".join(parts)


def _scene_record(i: int, plan: InferencePlan, files: StoryFiles, scene: MadeScene) -> dict:
    """Builds a scene's entry in the record."""
    config, source = plan.config, scene.source
    stop = sum(files.frame_counts)
    kept = source.record if isinstance(source, KeptScene) else {}
    own_seed = config.scene_seeds[i] if config.scene_seeds else None
    return {
        "prompt": config.prompts[i],
        "frames": [stop - files.frame_counts[i], stop],
        "context": source and source.context,
        "source": scene.origin,
        "continues_from": next(([k + 1 for k in window.context] for window in plan.windows if i in window.new), None),
        "seed": kept.get("seed", config.seed if own_seed is None else own_seed),
        **({"kept_from": str(source.clip)} if isinstance(source, KeptScene) else {}),
    }


def describe_run(plan: InferencePlan, model: LoadedModel) -> dict:
    """Describes a run for its record: the resolved configuration, the story, the software versions and the device."""
    pipe = model.pipe
    return {
        "config": recorded(plan.config),
        "story": plan.story and plan.story.record(),
        "command": shlex.join(sys.argv),
        "weights": model.identity,
        "mask_variant": pipe.transformer.config.mask_variant,
        "scheduler": {"class": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        **software(),
    }
