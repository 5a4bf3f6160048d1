"""Stories of any number of scenes: a window slides over them, and each new scene continues from the last ones.

Latents are passed from window to window, without a pass through the VAE or a video file. An interrupted story continues
from the scenes in its store, with the same result.
"""

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mask2dit.config import CONTEXTS, check_choice, check_context_cache
from mask2dit.files import atomic_path
from mask2dit.hashing import digest
from mask2dit.models.context_cache import context_cache_bytes
from mask2dit.pipelines.events import Observer, PreviewMade, SceneStarted, StepFinished, ignore
from mask2dit.pipelines.mask2dit import (
    SAMPLING_REMEDY,
    Mask2DiTPipeline,
    VideoShape,
    check_scheduler,
    check_shape,
    count_given_scenes,
    require_finite,
)
from mask2dit.pipelines.step_cache import check_step_cache, step_cache
from mask2dit.stories import ACTOR
from mask2dit.video.frames import to_uint8

logger = logging.getLogger(__name__)

KEY_LENGTH = 64  # hexadecimal digits of a scene's key
LATENTS = "latents"  # the tensor in a scene's file


@dataclass(frozen=True)
class ContextRule:
    """Which earlier scenes a window of a long story continues from, where not all of them fit.

    The latest scene is always among them. `last` adds the latest others, `anchor` the anchors and then the latest others,
    `cast` those that share most actors with the window's first new scene, of equals the latest.

    Raises:
        ValueError: for an unknown kind, or anchors that are not scene numbers.
    """

    kind: str = "last"
    """last, anchor or cast."""
    anchors: Sequence[int] = (1,)
    """Numbers, from 1, of the scenes that `anchor` keeps."""

    def __post_init__(self):
        check_choice("context", self.kind, CONTEXTS)
        if self.kind == "anchor" and not (self.anchors and all(type(i) is int and i > 0 for i in self.anchors)):
            raise ValueError(f"anchors={list(self.anchors)} has to hold numbers of scenes, counted from 1")

    def check_window(self, window: int) -> None:
        """Raises `ValueError` if the anchors, the latest scene and a new one do not fit into a window."""
        if self.kind == "anchor" and len(set(self.anchors)) + 2 > window:
            raise ValueError(
                f"anchors={list(self.anchors)} do not fit into window={window} with the latest scene and a new one: "
                f"use window={len(set(self.anchors)) + 2} or more, fewer anchors, or context=last"
            )

    def choose(self, done: int, count: int, actors: Sequence[frozenset[str]]) -> tuple[int, ...]:
        """Returns the indices of `count` of the scenes 0 to `done` - 1, in order of time.

        Args:
            done: number of existing scenes.
            count: number of scenes to choose, at most `done`.
            actors: names of the actors in each scene of the story, for `cast`.
        """
        others = list(range(done - 1))[::-1]
        if self.kind == "anchor":
            others.sort(key=lambda scene: scene + 1 not in self.anchors)
        elif self.kind == "cast":
            others.sort(key=lambda scene: -len(actors[scene] & actors[done]))
        return tuple(sorted([done - 1, *others][:count]))


class Window(NamedTuple):
    """Scenes that are generated together."""

    scenes: tuple[int, ...]
    """All scenes of the window, in order of time."""
    new: tuple[int, ...]
    """Those that are generated. The others are context."""

    @property
    def context(self) -> list[int]:
        return [scene for scene in self.scenes if scene not in self.new]


def story_windows(
    num_scenes: int,
    given: Collection[int] = (),
    window: int | None = None,
    rule: ContextRule = ContextRule(),
    actors: Sequence[frozenset[str]] = (),
) -> list[Window]:
    """Divides a story into windows, in the order in which they are generated.

    Where nothing follows, a window holds `window - 1` existing scenes, or fewer at the start, and is filled with new ones.
    New scenes between given ones see given scenes on both sides, as far as the window reaches.

    Args:
        num_scenes: number of scenes, given ones included.
        given: indices of the given scenes.
        window: number of scenes generated together. None: all of the story.
        rule: how existing scenes are chosen where not all of them fit.
        actors: names of the actors in each scene; only `cast` needs them.

    Raises:
        ValueError: if nothing is left to generate, the window is not positive, or the anchors do not fit into it.
    """
    window = num_scenes if window is None else window
    if window < 1:
        raise ValueError(f"window={window} has to be at least 1 scene")
    missing = [scene for scene in range(num_scenes) if scene not in given]
    if not missing:
        raise ValueError(
            f"{len(given)} context scenes leave nothing to generate with {num_scenes} prompts: every scene needs a prompt, "
            "given or generated"
        )
    if window < num_scenes:
        rule.check_window(window)
    windows = []
    while missing:
        first = missing[0]
        run = next(n for n in range(1, num_scenes + 1) if first + n not in missing)
        is_between = first + run < num_scenes and run <= window - 2
        before = (window - run + 1) // 2 if is_between else window - 1
        start = max(0, min(first - before, num_scenes - window))
        scenes = tuple(range(start, min(start + window, num_scenes)))
        if not is_between:
            scenes = (*rule.choose(first, first - start, actors), *range(first, scenes[-1] + 1))
        windows.append(Window(scenes, tuple(scene for scene in scenes if scene in missing)))
        missing = [scene for scene in missing if scene not in scenes]
    return windows


def write_latents(path: Path, latents: torch.Tensor) -> None:
    """Writes the latents of a scene, (1, F, C, h, w), as the tensor `LATENTS` of a safetensors file."""
    with atomic_path(path) as temporary:
        save_file({LATENTS: latents.contiguous().cpu()}, temporary)


class SceneStore:
    """Latents of finished scenes in a folder: one file per scene, with a key derived from the scene's inputs.

    Args:
        folder: the folder, created on first use.
        identity: identifies the weights, for instance by `mask2dit.hashing.fingerprint`; scenes made with other weights
            are not found.
    """

    def __init__(self, folder: str | os.PathLike, identity: str):
        self.folder = Path(folder)
        self.identity = identity

    def key(self, *made_from) -> str:
        """Returns the key of the scene that these weights make from the given inputs, any JSON values."""
        return digest([self.identity, *made_from], KEY_LENGTH)

    def load(self, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Loads a scene, (1, F, C, h, w). Returns None if it does not exist, and also, with a warning that names the file, if
        it has another shape or is not finite."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            latents = load_file(path)[LATENTS]
            check_shape("latents", latents, shape, "stories, latent frames, channels, h, w")
            require_finite("latents", latents, "the run that wrote them failed")
        except (SafetensorError, KeyError, ValueError, FloatingPointError) as error:
            logger.warning("%s is damaged (%s): its scene is made again", path, error)
            return None
        return latents

    def save(self, key: str, latents: torch.Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_latents(self._path(key), latents)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"


def plan_windows(
    pipe: Mask2DiTPipeline,
    prompts: Sequence[str],
    given: Collection[int],
    window: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | Sequence[int] | None,
    rule: ContextRule = ContextRule(),
) -> list[Window]:
    """Returns the windows of a story, as `story_windows`, after checking each. Needs no weights.

    Raises:
        ValueError: if the model does not support one of them.
    """
    actors = [frozenset(ACTOR.findall(prompt)) for prompt in prompts]
    windows = story_windows(len(prompts), given, window, rule, actors)
    height, width, num_frames = pipe.fill_size(height, width, num_frames)
    frames = pipe.video_shape(height, width, num_frames, len(prompts)).frames
    for scenes, _ in windows:
        pipe.video_shape(height, width, [frames[i] for i in scenes], len(scenes))
    return windows


def nearest_num_frames(pipe: Mask2DiTPipeline, num_frames: float) -> int:
    """Returns the number of frames nearest to a wanted one that the VAE and the temporal patch carry. Needs no weights."""
    ratio, patch_t = pipe.vae_scale_factor_temporal, pipe.transformer.config.patch_size_t or 1
    least = 1 if num_frames <= 1 else -(-2 // patch_t)  # more than one frame is a video, of two latent frames at least
    patches = max(least, math.floor(((num_frames - 1) / ratio + 1) / patch_t + 0.5))
    return ratio * (patches * patch_t - 1) + 1


def generate_story(
    pipe: Mask2DiTPipeline,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    window: int | None = None,
    context: str = "last",
    anchors: Sequence[int] = (1,),
    context_latents: torch.Tensor | None = None,
    given: Mapping[int, torch.Tensor] | None = None,
    noise_context: bool = False,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    use_dynamic_cfg: bool = False,
    context_refresh: int = 1,
    context_cache_device: str = "model",
    context_cache_dtype: str = "auto",
    guidance_interval: tuple[float, float] | None = None,
    context_guidance: bool = False,
    cache: str | None = None,
    cache_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: Sequence[int | None] | None = None,
    store: SceneStore | None = None,
    observer: Observer = ignore,
    preview_every: int = 0,
) -> Iterator[torch.Tensor]:
    """Generates a story window by window, with one scene per prompt.

    Args:
        pipe: the pipeline.
        prompts: one prompt per scene, given ones included.
        negative_prompt: one negative prompt for all scenes, or one per scene.
        window: number of scenes generated together, 3 for the published model. None: all of them.
        context, anchors: which earlier scenes a window continues from, as in `ContextRule`.
        context_latents: scaled latents of the given first scenes, (1, given*F, C, h, w), as from `pipe.encode_context`.
        given: scaled latents (1, F, C, h, w) of given scenes anywhere in the story, by the scene's index, instead of
            `context_latents`.
        noise_context, height, width, num_frames, num_inference_steps, guidance_scale, use_dynamic_cfg: as for the
            pipeline.
        context_refresh, context_cache_device, context_cache_dtype: as for the pipeline, in windows with context.
        guidance_interval, context_guidance: as for the pipeline.
        cache, cache_options: a step cache, as for `mask2dit.pipelines.step_cache.step_cache`.
        seed: seed of the noise, combined with the number of a window's first new scene.
        seeds: seed of each scene's initial noise. None: derived from `seed`, for all scenes or for one.
        store: keeps finished scenes, so that an interrupted story continues from them.
        observer: called with the events of `mask2dit.pipelines.events`.
        preview_every: number of steps between previews. 0: none.

    Returns:
        An iterator over the scaled latents (1, F, C, h, w) of every scene in order, given ones included, on the CPU. Each
        comes as soon as it is done.

    Raises:
        ValueError: at the call, for invalid arguments.
        FloatingPointError: at the first scene that is not finite; it is not stored.
    """
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompts has to be a list with one text for every scene, but is {prompts!r}")
    pipe.check_steps(num_inference_steps)
    check_scheduler(pipe.scheduler)
    check_context_cache(context_refresh, context_cache_device, context_cache_dtype)
    guidance = (guidance_scale, guidance_interval, context_guidance)
    options = check_step_cache(cache, cache_options, context_refresh, *guidance)
    num_scenes = len(prompts)
    size = pipe.fill_size(height, width, num_frames)
    shape = pipe.video_shape(*size, num_scenes)
    scenes = _given_scenes(context_latents, given, shape, window)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * num_scenes
    seeds = [None] * num_scenes if seeds is None else seeds
    for name, values in (("negative_prompt", negative_prompt), ("seeds", seeds)):
        if len(values) != num_scenes:
            raise ValueError(f"{name} has {len(values)} entries for {num_scenes} scenes")
    windows = plan_windows(pipe, prompts, scenes, window, *size, ContextRule(context, tuple(anchors)))
    check_context_refresh(context_refresh, windows)
    settings = {"height": size[0], "width": size[1], "num_inference_steps": num_inference_steps}
    settings |= {"guidance_scale": guidance_scale, "use_dynamic_cfg": use_dynamic_cfg, "noise_context": noise_context}
    if guidance_interval is not None:  # keys of scenes without it stay as they were
        settings["guidance_interval"] = list(guidance_interval)
    plan = StoryPlan(
        prompts=prompts,
        negative_prompts=negative_prompt,
        shape=shape,
        given=scenes,
        windows=windows,
        settings=settings,
        cache=cache,
        cache_options=options,
        context_refresh=context_refresh,
        context_cache_device=context_cache_device,
        context_cache_dtype=context_cache_dtype,
        context_guidance=context_guidance,
        seed=seed,
        seeds=seeds,
    )
    return _scenes(pipe, plan, store, _Watch(observer, preview_every))


@dataclass(frozen=True, kw_only=True)
class StoryPlan:
    """The checked arguments of `generate_story`."""

    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    shape: VideoShape
    given: Mapping[int, torch.Tensor]
    """Latents of the given scenes by index, (1, F, C, h, w) each."""
    windows: list[Window]
    """Windows, as `story_windows` returns them."""
    settings: dict
    """Arguments of the pipeline that all windows share."""
    context_refresh: int
    """As for the pipeline, in windows with context."""
    context_cache_device: str
    context_cache_dtype: str
    context_guidance: bool
    cache: str | None
    cache_options: Mapping[str, Any]
    seed: int
    seeds: Sequence[int | None]
    """Seeds of the scenes that have their own."""


def check_context_refresh(context_refresh: int, windows: Sequence[Window]) -> None:
    """Raises `ValueError` if given scenes are to be kept between steps, but no window has any."""
    if context_refresh > 1 and not any(window.context for window in windows):
        raise ValueError(
            f"context_refresh={context_refresh} keeps given scenes between steps, but no window of this story has any: use "
            "context_refresh=1, or a window that is shorter than the story"
        )


def context_cache_size(
    pipe: Mask2DiTPipeline, windows: Sequence[Window], shape: VideoShape, dtype: torch.dtype, mask_variant: str
) -> int:
    """Predicts the bytes that the context cache of a story keeps for each guidance branch, in the largest of its windows.

    Needs no weights.

    Args:
        pipe: the pipeline, or its skeleton.
        windows: the story's windows, as of `plan_windows`.
        shape: frames of the whole story.
        dtype: the model's dtype; `torch.float8_e4m3fn` for a cache in fp8.
        mask_variant: "v1" … "v5".
    """
    config = {**pipe.transformer.config, "mask_variant": mask_variant}
    sizes = []
    for window in windows:
        latent_frames = tuple(shape.latent_frames[scene] for scene in window.scenes)
        layout = pipe.transformer.scene_layout(*shape.latent_size[1:], latent_frames)
        generated = [scene in window.new for scene in window.scenes]
        sizes.append(context_cache_bytes(config, layout, generated, dtype))
    return max(sizes)


def check_continues(window: int | None) -> None:
    """Raises `ValueError` for a window that is too short to continue from given scenes."""
    if window == 1:
        raise ValueError("window=1 generates every scene alone, but context scenes are given: use window=2 or more")


def _given_scenes(
    context_latents: torch.Tensor | None,
    given: Mapping[int, torch.Tensor] | None,
    shape: VideoShape,
    window: int | None,
) -> dict[int, torch.Tensor]:
    meaning = "stories, frames, channels, h, w"
    if context_latents is None:
        for scene, latents in (given or {}).items():
            if not 0 <= scene < len(shape.frames):
                raise ValueError(f"scene {scene} is given, but scenes are counted from 0 to {len(shape.frames) - 1}")
            check_shape(f"given[{scene}]", latents, (1, shape.latent_frames[scene], *shape.latent_size), meaning)
        return {scene: latents.cpu() for scene, latents in (given or {}).items()}
    if given is not None:
        raise ValueError("give the context either as context_latents or as given, not both")
    check_shape("context_latents", context_latents, (1, len(context_latents[0]), *shape.latent_size), meaning)
    num_given = count_given_scenes(context_latents, shape.latent_frames)
    check_continues(window)
    return dict(enumerate(scene.cpu() for scene in context_latents.split(shape.latent_frames[:num_given], dim=1)))


def _scenes(
    pipe: Mask2DiTPipeline, plan: StoryPlan, store: SceneStore | None, watch: "_Watch"
) -> Iterator[torch.Tensor]:
    """Yields all scenes in order: given ones, stored ones and generated ones."""
    model = {
        "transformer": _own_settings(pipe.transformer),
        "scheduler": [type(pipe.scheduler).__name__, _own_settings(pipe.scheduler)],
        "dtype": str(pipe.transformer.dtype),
    }
    made = dict(plan.given)
    keys = {i: digest([scene.float().numpy().tobytes().hex()], KEY_LENGTH) for i, scene in made.items()}
    windows = iter(plan.windows)
    for number in range(len(plan.prompts)):
        if number not in made:
            window = next(windows)
            texts = [[texts[i] for i in window.scenes] for texts in (plan.prompts, plan.negative_prompts)]
            frames = [plan.shape.frames[i] for i in window.scenes]
            context_keys = [keys.get(scene) for scene in window.scenes]
            seeds = [plan.seed, *(plan.seeds[scene] for scene in window.new)]
            made_from = [model, plan.settings, texts, frames, context_keys, seeds, window.new]
            if plan.context_refresh > 1 and window.context:
                made_from.append([plan.context_refresh, plan.context_cache_dtype])
            if plan.context_guidance and window.context:
                made_from.append("context_guidance")
            if plan.cache:
                made_from.append([plan.cache, plan.cache_options])
            keys |= {scene: store.key(made_from, scene) if store else "" for scene in window.new}
            made |= _load_or_generate(pipe, plan, window, made, keys, store, watch)
        yield made[number]


def _load_or_generate(
    pipe: Mask2DiTPipeline,
    plan: StoryPlan,
    window: Window,
    made: Mapping[int, torch.Tensor],
    keys: Mapping[int, str],
    store: SceneStore | None,
    watch: "_Watch",
) -> dict[int, torch.Tensor]:
    """Returns the latents of a window's new scenes, from the store if all of them are there."""
    if store:
        shapes = {scene: (1, plan.shape.latent_frames[scene], *plan.shape.latent_size) for scene in window.new}
        latents = {scene: store.load(keys[scene], shape) for scene, shape in shapes.items()}
        if all(scene is not None for scene in latents.values()):
            logger.info("%s was made before and is taken from %s", _name(window.new), store.folder)
            return latents
    latents = _generate_window(pipe, plan, window, made, watch)
    for scene, made_now in latents.items() if store else ():
        store.save(keys[scene], made_now)
    return latents


def _generate_window(
    pipe: Mask2DiTPipeline, plan: StoryPlan, window: Window, made: Mapping[int, torch.Tensor], watch: "_Watch"
) -> dict[int, torch.Tensor]:
    """Generates the latents of a window's new scenes from those of its context."""
    num_scenes = len(plan.prompts)
    latent_frames = [plan.shape.latent_frames[i] for i in window.scenes]
    for scene in window.new:
        watch.observer(SceneStarted(scene))
    generator = torch.Generator().manual_seed(_window_seed(plan.seed, window.new[0]))
    progress_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**progress_bar, "desc": f"{_name(window.new)} of {num_scenes}"})
    try:
        with step_cache(pipe, plan.cache, plan.cache_options, plan.settings["num_inference_steps"]):
            latents = pipe(
                [plan.prompts[i] for i in window.scenes],
                negative_prompt=[plan.negative_prompts[i] for i in window.scenes],
                num_frames=[plan.shape.frames[i] for i in window.scenes],
                context_latents=torch.cat([made[i] for i in window.context], dim=1) if window.context else None,
                scene_mask=[scene in window.new for scene in window.scenes],
                generator=generator,
                latents=_own_noise(pipe, plan, window, generator),
                output_type="latent",
                callback_on_step_end=watch.callback(window, latent_frames),
                callback_on_step_end_tensor_inputs=watch.tensors,
                context_refresh=plan.context_refresh if window.context else 1,
                context_cache_device=plan.context_cache_device,
                context_cache_dtype=plan.context_cache_dtype,
                context_guidance=plan.context_guidance,
                **plan.settings,
            ).frames
    finally:
        pipe.set_progress_bar_config(**progress_bar)
    of_scenes = dict(zip(window.scenes, latents.cpu().split(latent_frames, dim=1)))
    for scene in window.new:
        require_finite(f"the latents of scene {scene + 1} of {num_scenes}", of_scenes[scene], SAMPLING_REMEDY)
    return {scene: of_scenes[scene] for scene in window.new}


def _own_noise(
    pipe: Mask2DiTPipeline, plan: StoryPlan, window: Window, generator: torch.Generator
) -> torch.Tensor | None:
    """Draws the initial noise of a window's new scenes as the pipeline would, except for scenes with their own seed.

    Returns:
        (1, new*F, C, h, w); None if no scene has its own seed.
    """
    seeds = [plan.seeds[scene] for scene in window.new]
    if all(seed is None for seed in seeds):
        return None
    latent_frames = [plan.shape.latent_frames[scene] for scene in window.new]
    shape = (1, sum(latent_frames), *plan.shape.latent_size)
    noise = torch.randn(shape, generator=generator, dtype=pipe.transformer.dtype)
    for scene, seed in zip(noise.split(latent_frames, dim=1), seeds):
        if seed is not None:
            own = torch.Generator().manual_seed(seed)
            scene.copy_(torch.randn(scene.shape, generator=own, dtype=scene.dtype))
    return noise


@dataclass(frozen=True)
class _Watch:
    """The observer of a story and its previews."""

    observer: Observer
    preview_every: int

    @property
    def tensors(self) -> list[str]:
        return ["denoised"] if self.preview_every else []

    def callback(self, window: Window, latent_frames: Sequence[int]):
        """Returns a callback of the pipeline that reports the steps of a window. None if nothing is observed, since the
        pipeline embeds negative prompts for a callback even without guidance."""
        if self.observer is ignore:
            return None

        def report(pipe: Mask2DiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            self.observer(StepFinished(window.new, step + 1, pipe.num_timesteps))
            if self.preview_every and (step + 1) % self.preview_every == 0 and step + 1 < pipe.num_timesteps:
                for scene, latents in zip(window.scenes, tensors["denoised"].split(list(latent_frames), dim=1)):
                    if scene in window.new:
                        middle = latents.shape[1] // 2
                        image = decode_scene(pipe, latents[:, middle : middle + 1])[0]
                        self.observer(PreviewMade(scene, step + 1, image))
            return {}

        return report


def decode_scene(pipe: Mask2DiTPipeline, latents: torch.Tensor, device: torch.device | None = None) -> np.ndarray:
    """Decodes the scaled latents (1, F, C, h, w) of one scene to frames, uint8 (frames, H, W, 3).

    Raises:
        FloatingPointError: as `Mask2DiTPipeline.decode_latents`.
    """
    return to_uint8(pipe.decode_latents(latents.to(device or latents.device), [latents.shape[1]])[0])


def _name(scenes: Sequence[int]) -> str:
    numbers = [str(scene + 1) for scene in scenes]
    return f"scene {numbers[0]}" if len(numbers) == 1 else f"scenes {', '.join(numbers[:-1])} and {numbers[-1]}"


def _own_settings(model) -> dict:
    """Returns a configuration without diffusers' internal entries, which differ between processes."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _window_seed(seed: int, first_scene: int) -> int:
    """Derives a seed that differs between windows, and between the windows of stories with neighbouring seeds."""
    return int(digest([seed, first_scene])[:15], 16)
