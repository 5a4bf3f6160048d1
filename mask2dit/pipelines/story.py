"""Stories of any number of scenes: a window slides over them, and each new scene continues from earlier ones.

Latents are passed from window to window, without a pass through the VAE or a video file. An interrupted story continues
from the scenes in its store, with the same result.
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

from mask2dit.config import CONTEXTS, check_choice, check_finite
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
from mask2dit.stories import ACTOR
from mask2dit.video.frames import to_uint8

logger = logging.getLogger(__name__)

KEY_LENGTH = 64  # hexadecimal digits of a scene's key


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


def story_windows(
    num_scenes: int,
    num_given: int = 0,
    window: int | None = None,
    rule: ContextRule = ContextRule(),
    actors: Sequence[frozenset[str]] = (),
) -> list[tuple[tuple[int, ...], range]]:
    """Divides a story into windows.

    Args:
        num_scenes: number of scenes, given ones included.
        num_given: number of given scenes, which come first.
        window: number of scenes generated together. None: all of the story.
        rule: how the context is chosen.
        actors: names of the actors in each scene; only `cast` needs them.

    Returns:
        (context, new) scenes of each window, in order of time. The context is `window - 1` existing scenes, or fewer at
        the start; new scenes fill the window.

    Raises:
        ValueError: if nothing is left to generate, the window is not positive, or the anchors do not fit into it.
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
    if window < num_scenes:
        rule.check_window(window)
    windows = []
    done = num_given
    while done < num_scenes:
        context = rule.choose(done, min(done, window - 1), actors)
        new = range(done, min(done + window - len(context), num_scenes))
        windows.append((context, new))
        done = new.stop
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
    prompts: Sequence[str],
    num_given: int,
    window: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | Sequence[int] | None,
    rule: ContextRule = ContextRule(),
) -> list[tuple[tuple[int, ...], range]]:
    """Returns the windows of a story, as `story_windows`, after checking each. Needs no weights.

    Raises:
        ValueError: if the model does not support one of them.
    """
    actors = [frozenset(ACTOR.findall(prompt)) for prompt in prompts]
    windows = story_windows(len(prompts), num_given, window, rule, actors)
    height, width, num_frames = pipe.fill_size(height, width, num_frames)
    frames = pipe.video_shape(height, width, num_frames, len(prompts)).frames
    for context, new in windows:
        scenes = (*context, *new)
        pipe.video_shape(height, width, [frames[i] for i in scenes], len(scenes))
    return windows


def generate_story(
    pipe: Mask2DiTPipeline,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    window: int | None = None,
    context: str = "last",
    anchors: Sequence[int] = (1,),
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
    """Generates a story window by window, with one scene per prompt.

    Args:
        pipe: the pipeline.
        prompts: one prompt per scene, given ones included.
        negative_prompt: one negative prompt for all scenes, or one per scene.
        window: number of scenes generated together, 3 for the published model. None: all of them.
        context, anchors: which earlier scenes a window continues from, as in `ContextRule`.
        context_latents: scaled latents of the given first scenes, (1, given*F, C, h, w), as from `pipe.encode_context`.
        noise_context, height, width, num_frames, num_inference_steps, guidance_scale, use_dynamic_cfg: as for the
            pipeline.
        seed: seed of the noise, combined with the number of a window's first new scene.
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
        windows=plan_windows(
            pipe, prompts, len(given), window, height, width, num_frames, ContextRule(context, tuple(anchors))
        ),
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
    windows: list[tuple[tuple[int, ...], range]]
    """Windows, as `story_windows` returns them."""
    settings: dict
    """Arguments of the pipeline that all windows share."""
    seed: int


def _given_scenes(context_latents: torch.Tensor, shape: VideoShape) -> list[torch.Tensor]:
    expected = (1, len(context_latents[0]), *shape.latent_size)
    check_shape("context_latents", context_latents, expected, "stories, frames, channels, h, w")
    num_given = count_given_scenes(context_latents, shape.latent_frames)
    return [scene.cpu() for scene in context_latents.split(shape.latent_frames[:num_given], dim=1)]


def _scenes(pipe: Mask2DiTPipeline, plan: StoryPlan, store: SceneStore | None) -> Iterator[torch.Tensor]:
    """Yields all scenes in order: given ones, stored ones and generated ones."""
    model = {
        "transformer": _own_settings(pipe.transformer),
        "scheduler": [type(pipe.scheduler).__name__, _own_settings(pipe.scheduler)],
        "dtype": str(pipe.transformer.dtype),
    }
    made = list(plan.given)
    keys = [digest([scene.float().numpy().tobytes().hex()], KEY_LENGTH) for scene in plan.given]
    yield from plan.given
    for context, new in plan.windows:
        scenes = (*context, *new)
        texts = [[plan.prompts[i] for i in scenes], [plan.negative_prompts[i] for i in scenes]]
        frames = [plan.shape.frames[i] for i in scenes]
        made_from = [model, plan.settings, texts, frames, [keys[i] for i in context], plan.seed, new.start]
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
    pipe: Mask2DiTPipeline, plan: StoryPlan, context: Sequence[int], new: range, made: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Generates the latents of a window's new scenes from those of all scenes before them."""
    scenes = (*context, *new)
    num_scenes = len(plan.prompts)
    progress_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**progress_bar, "desc": f"{_name(new)} of {num_scenes}"})
    try:
        latents = pipe(
            [plan.prompts[i] for i in scenes],
            negative_prompt=[plan.negative_prompts[i] for i in scenes],
            num_frames=[plan.shape.frames[i] for i in scenes],
            context_latents=torch.cat([made[i] for i in context], dim=1) if context else None,
            generator=torch.Generator().manual_seed(_window_seed(plan.seed, new.start)),
            output_type="latent",
            **plan.settings,
        ).frames
    finally:
        pipe.set_progress_bar_config(**progress_bar)
    parts = latents.split([plan.shape.latent_frames[i] for i in scenes], dim=1)[len(context) :]
    for number, part in zip(new, parts):
        require_finite(f"the latents of scene {number + 1} of {num_scenes}", part, SAMPLING_REMEDY)
    return [part.cpu() for part in parts]


def decode_scene(pipe: Mask2DiTPipeline, latents: torch.Tensor, device: torch.device | None = None) -> np.ndarray:
    """Decodes the scaled latents (1, F, C, h, w) of one scene to frames, uint8 (frames, H, W, 3).

    Raises:
        FloatingPointError: as `Mask2DiTPipeline.decode_latents`.
    """
    return to_uint8(pipe.decode_latents(latents.to(device or latents.device), [latents.shape[1]])[0])


def _name(scenes: range) -> str:
    return f"scene {scenes.stop}" if len(scenes) == 1 else f"scenes {scenes.start + 1} to {scenes.stop}"


def _own_settings(model) -> dict:
    """Returns a configuration without diffusers' internal entries, which differ between processes."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _window_seed(seed: int, first_scene: int) -> int:
    """Derives a seed that differs between windows, and between the windows of stories with neighbouring seeds."""
    return int(digest([seed, first_scene])[:15], 16)
