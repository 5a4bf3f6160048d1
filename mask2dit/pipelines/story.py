"""Stories of any number of scenes: a window slides over them, and each new scene continues from the last ones.

Latents are handed from window to window, so a scene never passes through the VAE or a video file on its way. A story that
was interrupted goes on from the scenes that its store holds, with the same result.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
from mask2dit.video.frames import to_uint8

logger = logging.getLogger(__name__)

KEY_LENGTH = 64  # of a scene's key, in hexadecimal digits


def story_windows(num_scenes: int, num_given: int = 0, window: int | None = None) -> list[tuple[range, range]]:
    """Which scenes are generated together, and from which ones.

    Args:
        num_scenes: scenes of the story, given ones included.
        num_given: the first scenes, which are given.
        window: scenes that the model handles at once. None: all of the story.

    Returns:
        (context, new) of each window. The context is the last `window - 1` scenes there are, or fewer at the start; new
        scenes fill the window.

    Raises:
        ValueError: if nothing is left to generate or the window is not positive.
    """
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
    done = num_given
    while done < num_scenes:
        context = range(max(0, done - (window - 1)), done)
        new = range(done, min(done + window - len(context), num_scenes))
        windows.append((context, new))
        done = new.stop
    return windows


class SceneStore:
    """Latents of the scenes that were made, in a folder: one file a scene, found again by what it was made from.

    Args:
        folder: created on first use.
        identity: names the weights, for instance by `mask2dit.models.loading.fingerprint`; a scene made with others is
            not found.
    """

    def __init__(self, folder: str | os.PathLike, identity: str):
        self.folder = Path(folder)
        self.identity = identity

    def key(self, *made_from) -> str:
        """The name of what these weights make from this: any JSON values."""
        return digest([self.identity, *made_from], KEY_LENGTH)

    def load(self, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """(1, F, C, h, w), or None if there is no such scene, or none of this shape and finite, with a warning that names the
        file."""
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
    num_scenes: int,
    num_given: int,
    window: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | Sequence[int] | None,
) -> list[tuple[range, range]]:
    """The windows of a story, as `story_windows` returns them, each checked. Needs no weights.

    Raises:
        ValueError: if the model cannot carry one of them.
    """
    windows = story_windows(num_scenes, num_given, window)
    height, width, num_frames = pipe.fill_size(height, width, num_frames)
    frames = pipe.video_shape(height, width, num_frames, num_scenes).frames
    for context, new in windows:
        pipe.video_shape(height, width, frames[context.start : new.stop], new.stop - context.start)
    return windows


def generate_story(
    pipe: Mask2DiTPipeline,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    window: int | None = None,
    context_latents: torch.Tensor | None = None,
    noise_context: bool = False,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    use_dynamic_cfg: bool = False,
    seed: int = 0,
    store: SceneStore | None = None,
) -> Iterator[torch.Tensor]:
    """Generates a story window by window, as many scenes as there are prompts.

    Args:
        pipe: the pipeline.
        prompts: one text for every scene, given ones included.
        negative_prompt: one text for all scenes, or one for each.
        window: scenes that the model handles at once, 3 for the published one. None: all of them.
        context_latents: given first scenes, (1, given*F, C, h, w) scaled, as from `pipe.encode_context`.
        noise_context, height, width, num_frames, num_inference_steps, guidance_scale, use_dynamic_cfg: as for the
            pipeline.
        seed: the noise of a window follows from it and from the window's first new scene alone.
        store: where scenes are kept and found again, so that an interrupted story goes on where it stopped.

    Returns:
        An iterator over the scaled latents (1, F, C, h, w) of every scene in order, given ones too, on the CPU.

    Raises:
        ValueError: at the call, for anything that cannot be carried out.
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
    given = [] if context_latents is None else _given_scenes(context_latents, shape)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * num_scenes
    elif len(negative_prompt) != num_scenes:
        raise ValueError(f"negative_prompt has {len(negative_prompt)} entries for {num_scenes} scenes")
    plan = StoryPlan(
        prompts=prompts,
        negative_prompts=negative_prompt,
        shape=shape,
        given=given,
        windows=plan_windows(pipe, num_scenes, len(given), window, height, width, num_frames),
        settings={
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "use_dynamic_cfg": use_dynamic_cfg,
            "noise_context": noise_context,
        },
        seed=seed,
    )
    return _scenes(pipe, plan, store)


@dataclass(frozen=True, kw_only=True)
class StoryPlan:
    """The checked arguments of `generate_story`."""

    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    shape: VideoShape
    given: list[torch.Tensor]
    """Latents of the first scenes, (1, F, C, h, w) each."""
    windows: list[tuple[range, range]]
    """As `story_windows` returns them."""
    settings: dict
    """Arguments of the pipeline that all windows share."""
    seed: int


def _given_scenes(context_latents: torch.Tensor, shape: VideoShape) -> list[torch.Tensor]:
    expected = (1, len(context_latents[0]), *shape.latent_size)
    check_shape("context_latents", context_latents, expected, "stories, frames, channels, h, w")
    num_given = count_given_scenes(context_latents, shape.latent_frames)
    return [scene.cpu() for scene in context_latents.split(shape.latent_frames[:num_given], dim=1)]


def _scenes(pipe: Mask2DiTPipeline, plan: StoryPlan, store: SceneStore | None) -> Iterator[torch.Tensor]:
    """All scenes in order: given ones, those of the store, and those that are generated."""
    model = {
        "transformer": _own_settings(pipe.transformer),
        "scheduler": [type(pipe.scheduler).__name__, _own_settings(pipe.scheduler)],
        "dtype": str(pipe.transformer.dtype),
    }
    made = list(plan.given)
    keys = [digest([scene.float().numpy().tobytes().hex()], KEY_LENGTH) for scene in plan.given]
    yield from plan.given
    for context, new in plan.windows:
        part = slice(context.start, new.stop)
        texts = [plan.prompts[part], plan.negative_prompts[part]]
        context_keys = [keys[i] for i in context]
        made_from = [model, plan.settings, texts, plan.shape.frames[part], context_keys, plan.seed, new.start]
        new_keys = [store.key(made_from, scene) if store else "" for scene in new]
        shapes = [(1, plan.shape.latent_frames[i], *plan.shape.latent_size) for i in new]
        latents = [store.load(key, shape) if store else None for key, shape in zip(new_keys, shapes)]
        if any(scene is None for scene in latents):
            latents = _generate_window(pipe, plan, context, new, made)
            if store:
                for key, scene in zip(new_keys, latents):
                    store.save(key, scene)
        else:
            logger.info("%s was made before and is taken from %s", _name(new), store.folder)
        made += latents
        keys += new_keys
        yield from latents


def _generate_window(
    pipe: Mask2DiTPipeline, plan: StoryPlan, context: range, new: range, made: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Latents of the window's new scenes, from those of all scenes before them."""
    part = slice(context.start, new.stop)
    num_scenes = len(plan.prompts)
    progress_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**progress_bar, "desc": f"{_name(new)} of {num_scenes}"})
    try:
        latents = pipe(
            plan.prompts[part],
            negative_prompt=plan.negative_prompts[part],
            num_frames=plan.shape.frames[part],
            context_latents=torch.cat([made[i] for i in context], dim=1) if context else None,
            generator=torch.Generator().manual_seed(_window_seed(plan.seed, new.start)),
            output_type="latent",
            **plan.settings,
        ).frames
    finally:
        pipe.set_progress_bar_config(**progress_bar)
    scenes = [latents.cpu() for latents in latents.split(plan.shape.latent_frames[part], dim=1)[len(context) :]]
    for number, scene in zip(new, scenes):
        require_finite(f"the latents of scene {number + 1} of {num_scenes}", scene, SAMPLING_REMEDY)
    return scenes


def decode_scene(pipe: Mask2DiTPipeline, latents: torch.Tensor, device: torch.device | None = None) -> np.ndarray:
    """The frames of one scene, uint8 (frames, H, W, 3), of its scaled latents (1, F, C, h, w).

    Raises:
        FloatingPointError: as `Mask2DiTPipeline.decode_latents`.
    """
    return to_uint8(pipe.decode_latents(latents.to(device or latents.device), [latents.shape[1]])[0])


def _name(scenes: range) -> str:
    return f"scene {scenes.stop}" if len(scenes) == 1 else f"scenes {scenes.start + 1} to {scenes.stop}"


def _own_settings(model) -> dict:
    """A configuration without what diffusers notes in it for itself, which differs from process to process."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _window_seed(seed: int, first_scene: int) -> int:
    """Seeds that differ between windows, and between the windows of stories with neighbouring seeds."""
    return int(digest([seed, first_scene])[:15], 16)
