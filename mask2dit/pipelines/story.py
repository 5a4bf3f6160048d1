"""Stories of any number of scenes: a window slides over them, and each new scene continues from the last ones.

Latents are passed from window to window, without a pass through the VAE or a video file. An interrupted story continues
from the scenes in its store, with the same result.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mask2dit.config import check_finite
from mask2dit.files import atomic_path
from mask2dit.hashing import digest
from mask2dit.pipelines.mask2dit import (
    SAMPLING_REMEDY,
    Mask2DiTPipeline,
    VideoShape,
    check_scheduler,
    check_shape,
    count_given_scenes,
    require_finite,
)
from mask2dit.randomness import generator_for
from mask2dit.video.frames import to_uint8

logger = logging.getLogger(__name__)

KEY_LENGTH = 64  # hexadecimal digits of a scene's key


@dataclass(frozen=True)
class Window:
    """Neighbouring scenes that are generated together, by their indices in the story."""

    scenes: range
    """All scenes of the window."""
    new: tuple[int, ...]
    """The scenes that the window generates. The others are its context."""

    @property
    def context(self) -> tuple[int, ...]:
        return tuple(scene for scene in self.scenes if scene not in self.new)

    @property
    def scene_mask(self) -> list[bool]:
        """True for each scene that is generated."""
        return [scene in self.new for scene in self.scenes]

    def __str__(self) -> str:
        first, last = self.new[0] + 1, self.new[-1] + 1
        if last - first + 1 == len(self.new) > 1:
            return f"scenes {first} to {last}"
        return f"scene{'s' * (len(self.new) > 1)} {', '.join(str(scene + 1) for scene in self.new)}"


def story_windows(scene_mask: Sequence[bool], window: int | None = None) -> list[Window]:
    """Divides a story into windows.

    A window ends with the first missing scene, or later where scenes are missing from the start, and begins with the
    `window - 1` scenes before it, or fewer at the start. Given scenes right after a missing one take up to half of its
    context, so that it also leads up to them.

    Args:
        scene_mask: one bool per scene: True where the scene is generated, False where it is given.
        window: number of scenes generated together. None: all of the story.

    Returns:
        The windows in the order of generation.

    Raises:
        ValueError: if nothing is left to generate or the window is not positive.
    """
    num_scenes, num_given = len(scene_mask), list(scene_mask).count(False)
    window = num_scenes if window is None else window
    if window < 1:
        raise ValueError(f"window={window} has to be at least 1 scene")
    if num_given >= num_scenes:
        raise ValueError(
            f"{num_given} context scenes leave nothing to generate with {num_scenes} prompts: every scene needs a prompt, "
            "given or generated"
        )
    if num_given and window == 1:
        raise ValueError(
            "window=1 makes every scene by itself, but there are context scenes to go on from: use window=2 or more"
        )
    windows = []
    missing = [scene for scene in range(num_scenes) if scene_mask[scene]]
    while missing:
        first = missing[0]
        following = next((scene for scene in missing if scene > first), num_scenes) - first - 1
        start = max(0, first - (window - 1) + min(following, (window - 1) // 2))
        scenes = range(start, min(start + window, num_scenes))
        new = tuple(scene for scene in scenes if scene in missing)
        windows.append(Window(scenes, new))
        missing = missing[len(new) :]
    return windows


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
            latents = load_file(path)["latents"]
            check_shape("latents", latents, shape, "stories, latent frames, channels, h, w")
            require_finite("latents", latents, "the run that wrote them failed")
        except (SafetensorError, KeyError, ValueError, FloatingPointError) as error:
            logger.warning("%s is damaged (%s): its scene is made again", path, error)
            return None
        return latents

    def save(self, key: str, latents: torch.Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(key)) as path:
            save_file({"latents": latents.contiguous().cpu()}, path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"


def plan_windows(
    pipe: Mask2DiTPipeline,
    scene_mask: Sequence[bool],
    window: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | Sequence[int] | None,
) -> list[Window]:
    """Returns the windows of a story, as `story_windows`, after checking each. Needs no weights.

    Raises:
        ValueError: if the model does not support one of them.
    """
    windows = story_windows(scene_mask, window)
    height, width, num_frames = pipe.fill_size(height, width, num_frames)
    frames = pipe.video_shape(height, width, num_frames, len(scene_mask)).frames
    for part in windows:
        pipe.video_shape(height, width, frames[part.scenes.start : part.scenes.stop], len(part.scenes))
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
    context_latents: torch.Tensor | None = None,
    scene_mask: Sequence[bool] | None = None,
    noise_context: bool = False,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    use_dynamic_cfg: bool = False,
    seed: int = 0,
    scene_seeds: Sequence[int | None] | None = None,
    store: SceneStore | None = None,
) -> Iterator[torch.Tensor]:
    """Generates a story window by window, with one scene per prompt.

    Args:
        pipe: the pipeline.
        prompts: one prompt per scene, given ones included.
        negative_prompt: one negative prompt for all scenes, or one per scene.
        window: number of scenes generated together, 3 for the published model. None: all of them.
        context_latents: scaled latents of the given scenes in order, (1, given*F, C, h, w), as from `pipe.encode_context`.
        scene_mask: (S,) bools, True for generated scenes, False for given ones. None: the given scenes come first.
        noise_context, height, width, num_frames, num_inference_steps, guidance_scale, use_dynamic_cfg: as for the
            pipeline.
        seed: seed of the noise, combined with the number of a window's first new scene.
        scene_seeds: one entry per scene: a seed of its initial noise (`scene_noise`), or None for the noise that follows from
            `seed`. None: no scene has its own. Noise that the sampler draws at each step follows from `seed`.
        store: keeps finished scenes, so that an interrupted story continues from them.

    Returns:
        An iterator over the scaled latents (1, F, C, h, w) of every scene in order, given ones included, on the CPU.

    Raises:
        ValueError: at the call, for invalid arguments.
        FloatingPointError: at the first scene that is not finite; it is not stored.
    """
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompts has to be a list with one text for every scene, but is {prompts!r}")
    pipe.check_steps(num_inference_steps)
    check_scheduler(pipe.scheduler)
    check_finite("guidance_scale", guidance_scale)
    num_scenes = len(prompts)
    height, width, num_frames = pipe.fill_size(height, width, num_frames)
    shape = pipe.video_shape(height, width, num_frames, num_scenes)
    scene_mask = _scene_mask(scene_mask, context_latents, shape)
    seeds = [None] * num_scenes if scene_seeds is None else list(scene_seeds)
    if len(seeds) != num_scenes:
        raise ValueError(f"scene_seeds has {len(seeds)} entries for {num_scenes} scenes")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * num_scenes
    elif len(negative_prompt) != num_scenes:
        raise ValueError(f"negative_prompt has {len(negative_prompt)} entries for {num_scenes} scenes")
    plan = StoryPlan(
        prompts=prompts,
        negative_prompts=negative_prompt,
        shape=shape,
        given=_given_scenes(context_latents, scene_mask, shape),
        windows=plan_windows(pipe, scene_mask, window, height, width, num_frames),
        settings={
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "use_dynamic_cfg": use_dynamic_cfg,
            "noise_context": noise_context,
        },
        seed=seed,
        scene_seeds=seeds,
    )
    return _scenes(pipe, plan, store)


@dataclass(frozen=True, kw_only=True)
class StoryPlan:
    """The checked arguments of `generate_story`."""

    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    shape: VideoShape
    given: dict[int, torch.Tensor]
    """Latents of the given scenes, (1, F, C, h, w) each, by their index."""
    windows: list[Window]
    """Windows, as `story_windows` returns them."""
    settings: dict
    """Arguments of the pipeline that all windows share."""
    seed: int
    scene_seeds: Sequence[int | None]
    """The seed of each scene's own initial noise; None: it follows from `seed`."""


def _scene_mask(
    scene_mask: Sequence[bool] | None, context_latents: torch.Tensor | None, shape: VideoShape
) -> list[bool]:
    """Returns the mask for the given scenes, which come first unless a mask says otherwise."""
    num_scenes = len(shape.frames)
    if scene_mask is None:
        num_given = 0 if context_latents is None else count_given_scenes(context_latents, shape.latent_frames)
        return [False] * num_given + [True] * (num_scenes - num_given)
    mask = [bool(new) for new in scene_mask]
    if len(mask) != num_scenes:
        raise ValueError(f"scene_mask has {len(mask)} entries for {num_scenes} scenes")
    if context_latents is None and not all(mask):
        raise ValueError(f"scene_mask marks {mask.count(False)} scenes as given, but there is no context_latents")
    return mask


def _given_scenes(
    context_latents: torch.Tensor | None, scene_mask: Sequence[bool], shape: VideoShape
) -> dict[int, torch.Tensor]:
    if context_latents is None:
        return {}
    given = [scene for scene, new in enumerate(scene_mask) if not new]
    latent_frames = [shape.latent_frames[scene] for scene in given]
    expected = (1, sum(latent_frames), *shape.latent_size)
    check_shape("context_latents", context_latents, expected, "stories, frames, channels, h, w")
    return dict(zip(given, (scene.cpu() for scene in context_latents.split(latent_frames, dim=1))))


def _scenes(pipe: Mask2DiTPipeline, plan: StoryPlan, store: SceneStore | None) -> Iterator[torch.Tensor]:
    """Yields all scenes in order: given ones, stored ones and generated ones."""
    model = {
        "transformer": _own_settings(pipe.transformer),
        "scheduler": [type(pipe.scheduler).__name__, _own_settings(pipe.scheduler)],
        "dtype": str(pipe.transformer.dtype),
    }
    made = dict(plan.given)
    keys = {i: digest([scene.float().numpy().tobytes().hex()], KEY_LENGTH) for i, scene in plan.given.items()}
    ready = 0  # scenes that were yielded
    for window in plan.windows:
        while ready in made:
            yield made[ready]
            ready += 1
        made_from = _made_from(model, plan, window, keys)
        new_keys = [store.key(made_from, scene) if store else "" for scene in window.new]
        shapes = [(1, plan.shape.latent_frames[i], *plan.shape.latent_size) for i in window.new]
        latents = [store.load(key, shape) if store else None for key, shape in zip(new_keys, shapes)]
        if any(scene is None for scene in latents):
            latents = _generate_window(pipe, plan, window, made)
            if store:
                for key, scene in zip(new_keys, latents):
                    store.save(key, scene)
        else:
            logger.info("%s: made before and taken from %s", window, store.folder)
        made |= dict(zip(window.new, latents))
        keys |= dict(zip(window.new, new_keys))
    while ready in made:
        yield made[ready]
        ready += 1


def _made_from(model: dict, plan: StoryPlan, window: Window, keys: dict[int, str]) -> list:
    """Lists what a window's new scenes depend on, besides the weights."""
    part = slice(window.scenes.start, window.scenes.stop)
    texts = [plan.prompts[part], plan.negative_prompts[part]]
    context_keys = [keys[i] for i in window.context]
    made_from = [model, plan.settings, texts, plan.shape.frames[part], context_keys, plan.seed, window.new[0]]
    if any(window.scene_mask[: len(window.context)]):  # the context does not come first
        made_from.append({"scene_mask": window.scene_mask})
    if seeds := {str(i): plan.scene_seeds[i] for i in window.new if plan.scene_seeds[i] is not None}:
        made_from.append({"scene_seeds": seeds})
    return made_from


def _generate_window(
    pipe: Mask2DiTPipeline, plan: StoryPlan, window: Window, made: dict[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Generates the latents of a window's new scenes from those of its context."""
    part = slice(window.scenes.start, window.scenes.stop)
    num_scenes = len(plan.prompts)
    generator = torch.Generator().manual_seed(_window_seed(plan.seed, window.new[0]))
    progress_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**progress_bar, "desc": f"{window} of {num_scenes}"})
    try:
        latents = pipe(
            plan.prompts[part],
            negative_prompt=plan.negative_prompts[part],
            num_frames=plan.shape.frames[part],
            context_latents=torch.cat([made[i] for i in window.context], dim=1) if window.context else None,
            scene_mask=window.scene_mask,
            generator=generator,
            latents=_initial_noise(pipe, plan, window, generator),
            output_type="latent",
            **plan.settings,
        ).frames
    finally:
        pipe.set_progress_bar_config(**progress_bar)
    scenes = dict(zip(window.scenes, latents.cpu().split(plan.shape.latent_frames[part], dim=1)))
    for i in window.new:
        require_finite(f"the latents of scene {i + 1} of {num_scenes}", scenes[i], SAMPLING_REMEDY)
    return [scenes[i] for i in window.new]


def _initial_noise(
    pipe: Mask2DiTPipeline, plan: StoryPlan, window: Window, generator: torch.Generator
) -> torch.Tensor | None:
    """Draws the noise of a window as the pipeline would, and replaces that of scenes with a seed of their own.

    Returns:
        (1, new*F, C, h, w); None if no scene has a seed of its own.
    """
    if all(plan.scene_seeds[i] is None for i in window.new):
        return None
    latent_frames = [plan.shape.latent_frames[i] for i in window.new]
    shape = (1, sum(latent_frames), *plan.shape.latent_size)
    noise = randn_tensor(shape, generator, dtype=pipe.transformer.dtype)
    for i, scene in zip(window.new, noise.split(latent_frames, dim=1)):
        if (seed := plan.scene_seeds[i]) is not None:
            scene.copy_(scene_noise(seed, tuple(scene.shape), pipe.transformer.dtype))
    return noise


def scene_noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws the initial noise of one scene from its own seed, whatever its position in the story.

    Args:
        seed: the scene's seed.
        shape: (1, F, C, h, w).
        dtype: data type of the transformer.
    """
    return randn_tensor(shape, generator_for(seed, "scene"), dtype=dtype)


def decode_scene(pipe: Mask2DiTPipeline, latents: torch.Tensor, device: torch.device | None = None) -> np.ndarray:
    """Decodes the scaled latents (1, F, C, h, w) of one scene to frames, uint8 (frames, H, W, 3).

    Raises:
        FloatingPointError: as `Mask2DiTPipeline.decode_latents`.
    """
    return to_uint8(pipe.decode_latents(latents.to(device or latents.device), [latents.shape[1]])[0])


def _own_settings(model) -> dict:
    """Returns a configuration without diffusers' internal entries, which differ between processes."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _window_seed(seed: int, first_scene: int) -> int:
    """Derives a seed that differs between windows, and between the windows of stories with neighbouring seeds."""
    return int(digest([seed, first_scene])[:15], 16)
