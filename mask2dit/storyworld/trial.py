"""Generates stories of the small world: `python -m mask2dit.storyworld.trial [CONFIG.yaml] [key=value …]`.

Each story is written as a video, next to a record of the settings; `mask2dit.storyworld.report` measures them. An interrupted
trial continues with the missing stories.

Shapes: B stories, S scenes, F latent frames per scene, C latent channels, h x w latent size.
"""

import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mask2dit.command import run_command
from mask2dit.config import (
    CONTEXTS,
    DTYPES,
    QUANTIZATIONS,
    SAMPLERS,
    check_at_least,
    check_cache,
    check_choice,
    check_context_cache,
    check_guidance_interval,
)
from mask2dit.files import check_writable, read_json, write_text
from mask2dit.provenance import describe_changes, software
from mask2dit.randomness import generator_for
from mask2dit.storyworld.render import render_scene
from mask2dit.storyworld.world import SPLITS, Story, caption, sample_story
from mask2dit.video.frames import to_uint8
from mask2dit.video.writing import write_video

if TYPE_CHECKING:
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

logger = logging.getLogger(__name__)

RECORD = "trial.json"
FPS = 8


@dataclass(frozen=True)
class Task:
    """The given and the generated scenes of a story."""

    num_scenes: int
    given: tuple[int, ...] = ()
    is_isolated: bool = False
    """True if the given scenes are hidden from the model, which generates the others without them."""
    returns: bool = False
    """True if an actor of the first scene is absent from the next scenes and returns in the last, as in
    `returning_story`."""

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(scene for scene in range(self.num_scenes) if scene not in self.given)


TASKS = {
    "fixed": Task(3),  # all scenes at once
    "extension": Task(3, given=(0, 1)),  # the third scene from two real ones
    "no_context": Task(3, given=(0, 1), is_isolated=True),  # the control: the third scene alone
    "middle": Task(3, given=(0, 2)),
    "sliding": Task(8, given=(0, 1)),  # two real scenes, then one scene after another
    "drift": Task(12, given=(0, 1)),  # the same for longer
    "return": Task(4, given=(0, 1, 2), returns=True),  # three real scenes, two of them without an actor of the fourth
    "return_no_context": Task(4, given=(0, 1, 2), returns=True, is_isolated=True),  # its control
}
WINDOW = 3  # scenes that the model was trained with
# The first story of each purpose; lower numbers are for training. Settings are chosen on tuning stories. Published numbers
# come from reporting stories alone, on which nothing is ever chosen.
FIRST_STORY = {"tuning": 100_000, "reporting": 10_000_000}
SEEDS_APART = 1_000_000_000  # between the stories that `returning_story` tries


@dataclass(kw_only=True)
class TrialConfig:
    """The model and the stories of a trial."""

    model: str = "models/storyworld"
    """Model folder in diffusers' layout, or a name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""
    variant: str | None = None
    """Variant of the weights, such as fp16, where the model has several; null: the plain ones."""
    mask_variant: str | None = None
    """Mask variant: v1, v2, v3, v4 or v5; null: the model's own."""
    task: str = "fixed"
    """Task: fixed, extension, no_context, middle, sliding, drift, return or return_no_context."""
    context: str = "last"
    """Earlier scenes that a window continues from in a story of more than three scenes: last, anchor (with scene 1) or
    cast."""
    output_dir: str = "outputs/storyworld/trials/fixed"
    """Folder for the videos and the record."""
    split: str = "held_out"
    """Split of the stories: held_out (with combinations that training never showed) or train (like those of training)."""
    stories: str = "tuning"
    """Purpose of the stories: tuning (to choose settings) or reporting (for published numbers alone); see `FIRST_STORY`."""
    num_stories: int = 100
    """Number of stories."""
    seed: int = 0
    """Seed of the noise, combined with the story's seed."""
    sampler: str = "dpm"
    """Sampler: ddim or dpm."""
    num_inference_steps: int = 10
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Weight of classifier-free guidance."""
    guidance_interval: Any = None
    """The lowest and the highest timestep that are guided, such as [100, 800]; null: all."""
    context_guidance: bool = False
    """Where scenes are given, guidance compares with each scene alone."""
    cache: str | None = None
    """Step cache: pyramid_attention, faster_cache, first_block, taylorseer, taylorseer_lite or mag_cache; null: none."""
    context_refresh: int = 1
    """Compute given scenes at the first and every k-th step alone; 1 is exact."""
    context_cache_dtype: str = "auto"
    """Data type of the given scenes' keys and values that are kept between: auto (the model's) or fp8."""
    num_frames: int = 9
    """Frames per scene."""
    height: int = 64
    """Height in pixels."""
    width: int = 64
    """Width in pixels."""
    batch_size: int = 10
    """Stories generated together."""
    dtype: str = "bfloat16"
    """Data type of the model: float32, bfloat16 or float16."""

    quantization: str | None = None
    """Form of the transformer's weights: int8 or fp8 (torchao), bnb_int8 or nf4 (bitsandbytes, on a GPU); null: `dtype`."""

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("context", self.context, CONTEXTS)
        check_choice("split", self.split, SPLITS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("stories", self.stories, FIRST_STORY)
        check_choice("dtype", self.dtype, DTYPES)
        check_context_cache(self.context_refresh, "model", self.context_cache_dtype)
        check_guidance_interval(self.guidance_interval)
        check_cache(self.cache)
        if self.context_refresh > 1 and (not TASKS[self.task].given or TASKS[self.task].is_isolated):
            raise ValueError(
                f"context_refresh={self.context_refresh} keeps given scenes, but task={self.task} has none"
            )
        for name in ("num_stories", "batch_size"):
            check_at_least(name, getattr(self, name), 1)


def run_trial(config: TrialConfig) -> None:
    """Generates the missing stories.

    Raises:
        FileNotFoundError, ValueError, FileExistsError: before weights are read, if the model is missing or unfit, or the
            folder holds another trial.
    """
    from mask2dit.models.hub import local_model
    from mask2dit.models.loading import select_sampler
    from mask2dit.models.quantization import check_quantization
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

    if config.quantization:
        check_quantization(config.quantization, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = local_model(config)
    task, folder = TASKS[config.task], Path(config.output_dir)
    skeleton = Mask2DiTPipeline.skeleton(config.model, variant=config.variant)
    skeleton.video_shape(config.height, config.width, config.num_frames, task.num_scenes)
    check_writable(folder)
    _record(config, folder)
    missing = [seed for seed in story_seeds(config) if not video_path(folder, seed).is_file()]
    if not missing:
        logger.info("all %d stories are in %s", config.num_stories, folder)
        return
    pipe = Mask2DiTPipeline.from_pretrained(
        config.model,
        mask_variant=config.mask_variant,
        torch_dtype=getattr(torch, config.dtype),
        variant=config.variant,
        quantization={"transformer": config.quantization} if config.quantization else None,
    )
    pipe.scheduler = select_sampler(pipe.scheduler, config.sampler)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    for seeds in tqdm(_batches(config, missing), unit="batch"):
        stories = [story_of(config, seed) for seed in seeds]
        generators = [generator_for(config.seed, seed) for seed in seeds]
        for seed, video in zip(seeds, make_stories(pipe, config, stories, generators)):
            write_video(video_path(folder, seed), to_uint8(video), FPS, full_chroma=True)


@torch.no_grad()
def make_stories(
    pipe: "Mask2DiTPipeline", config: TrialConfig, stories: Sequence[Story], generators: Sequence[torch.Generator]
):
    """Videos of all scenes of B stories, including given ones, as (B, S*frames, H, W, 3) in [0, 1].

    Args:
        pipe: the model.
        config: settings of the trial.
        stories: stories with as many scenes as the task, and with equal `windows`.
        generators: one per story.
    """
    from mask2dit.pipelines.step_cache import step_cache

    task = TASKS[config.task]
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    prompts = [[caption(story, k) for k in range(task.num_scenes)] for story in stories]
    scenes: list[torch.Tensor | None] = [None] * task.num_scenes  # latents, (B, F, C, h, w)
    for k in task.given:
        rendered = [[render_scene(story, k, config.num_frames, config.height, config.width)] for story in stories]
        scenes[k] = pipe.encode_context(rendered, [config.num_frames], config.height, config.width)

    for window, generated in windows(config, stories[0]):
        context = [scenes[k] for k in window if k not in generated]
        with step_cache(pipe, config.cache, num_steps=config.num_inference_steps):
            latents = pipe(
                [[texts[k] for k in window] for texts in prompts],
                context_latents=torch.cat(context, dim=1) if context else None,
                scene_mask=[k in generated for k in window],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_interval=config.guidance_interval,
                context_guidance=config.context_guidance,
                context_refresh=config.context_refresh if context else 1,
                context_cache_dtype=config.context_cache_dtype,
                generator=list(generators),
                output_type="latent",
                **size,
            ).frames
        for k, scene in zip(window, latents.chunk(len(window), dim=1)):
            scenes[k] = scene
    return pipe.decode_latents(torch.cat(scenes, dim=1), [scene.shape[1] for scene in scenes])


def windows(config: TrialConfig, story: Story) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The calls that generate a story's scenes: the scenes that each sees, and those of them that it generates."""
    task = TASKS[config.task]
    if task.is_isolated:
        return tuple(((k,), (k,)) for k in task.generated)
    if task.num_scenes <= WINDOW:
        return ((tuple(range(task.num_scenes)), task.generated),)
    from mask2dit.pipelines.story import ContextRule, story_windows

    actors = [frozenset(map(str, scene.present)) for scene in story.scenes]
    return tuple(story_windows(task.num_scenes, task.given, WINDOW, ContextRule(config.context), actors))


def story_of(config: TrialConfig, seed: int) -> Story:
    """The story behind a video of a trial."""
    task = TASKS[config.task]
    if task.returns:
        return returning_story(seed, task.num_scenes, config.split)
    return sample_story(seed, task.num_scenes, config.split)


def returning_story(seed: int, num_scenes: int, split: str) -> Story:
    """The first of a seed's stories in which `returning_actors` finds one."""
    for attempt in itertools.count():
        story = sample_story(seed + SEEDS_APART * attempt, num_scenes, split)
        if returning_actors(story):
            return story


def returning_actors(story: Story) -> list[int]:
    """Indices of the actors of the first scene that are absent from all others but the last."""
    first, *middle, last = (set(scene.present) for scene in story.scenes)
    return sorted((first & last).difference(*middle))


def _batches(config: TrialConfig, seeds: Sequence[int]) -> list[list[int]]:
    """Divides stories into batches with equal windows."""
    groups: dict[tuple, list[int]] = {}
    for seed in seeds:
        groups.setdefault(windows(config, story_of(config, seed)), []).append(seed)
    size = config.batch_size
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]


def story_seeds(config: TrialConfig) -> range:
    first = FIRST_STORY[config.stories]
    return range(first, first + config.num_stories)


def video_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.mp4"


def read_record(folder: Path) -> TrialConfig:
    """Reads the configuration of the trial in a folder. Raises `FileNotFoundError` if it does not hold one."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no trial (no {RECORD}): run mask2dit.storyworld.trial first")
    remedy = "remove this trial and make it again"
    record = read_json(path, remedy)
    try:
        return TrialConfig(**record["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the record of a trial of this version ({error}): {remedy}") from error


def _record(config: TrialConfig, folder: Path) -> None:
    """Writes the configuration of the trial, after checking that it agrees with the one in the folder, if any."""
    from mask2dit.models.hub import recorded

    if (folder / RECORD).is_file():
        free = ("output_dir", "num_stories", "batch_size")
        then = dataclasses.asdict(read_record(folder))
        if changes := describe_changes(then, recorded(config), ignore=free):
            raise FileExistsError(f"{str(folder)!r} holds another trial: {changes}; choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": recorded(config), **software()}
    write_text(folder / RECORD, json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.exit(run_command(TrialConfig, "mask2dit.storyworld.trial:run_trial", None, sys.argv[1:]))
