"""What a story file says, as keys of the configuration."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from mask2dit.inference.config import InferenceConfig
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.story import nearest_num_frames
from mask2dit.stories import Scene, Story, read_story

logger = logging.getLogger(__name__)


def resolve_story(config: InferenceConfig, skeleton: Mask2DiTPipeline) -> tuple[InferenceConfig, Story | None]:
    """Replaces a configuration's story file by what it says: prompts, given scenes, lengths, negative prompt and seeds.

    Returns:
        The configuration without `story`, and the story; the configuration as it is and None if it names no file.

    Raises:
        ValueError, FileNotFoundError: if the file is missing or faulty.
    """
    if config.story is None:
        return config, None
    story = read_story(config.story)
    given = [str(Path(config.story).parent / scene.video) for scene in story.scenes if scene.video is not None]
    seeds = [scene.seed for scene in story.scenes]
    *_, num_frames = skeleton.fill_size(config.height, config.width, config.num_frames)
    if story.negative and config.negative_prompt:
        logger.info("The negative prompt is the story's: %s", story.negative)
    seed = story.seed if config.seed is None else config.seed
    resolved = dataclasses.replace(
        config,
        story=None,
        prompts=list(story.prompts),
        context_videos=given,
        scene_mask=[scene.video is None for scene in story.scenes] if given else None,
        scene_seeds=seeds if any(seed is not None for seed in seeds) else None,
        num_frames=scene_frames(skeleton, story, config.fps, num_frames),
        negative_prompt=story.negative or config.negative_prompt,
        seed=seed,
    )
    return resolved, story


def scene_frames(
    skeleton: Mask2DiTPipeline, story: Story, fps: float, num_frames: int | Sequence[int]
) -> int | list[int]:
    """Returns the frames of each scene, as near to the story's lengths as the model carries, and logs what is rounded.

    Args:
        skeleton: the model without its weights.
        story: the story.
        fps: frames per second, for lengths in seconds.
        num_frames: frames of the scenes without a length, for all or one entry per scene.

    Returns:
        One entry per scene; `num_frames` itself if no scene has a length.
    """
    lengths = [scene.length(fps) for scene in story.scenes]
    if all(length is None for length in lengths):
        return num_frames if isinstance(num_frames, int) else list(num_frames)
    frames = [num_frames] * len(lengths) if isinstance(num_frames, int) else list(num_frames)
    if len(frames) != len(lengths):
        raise ValueError(f"num_frames has {len(frames)} entries for {len(lengths)} scenes")
    for i, length in enumerate(lengths):
        if length is not None:
            frames[i] = nearest_num_frames(skeleton, length)
            if frames[i] != length:
                logger.info("Scene %d: %s", i + 1, describe_rounding(story.scenes[i], frames[i], fps))
    return frames


def describe_rounding(scene: Scene, num_frames: int, fps: float) -> str:
    """Says what a scene's length becomes, such as "6 s at 8 fps are 48 frames; the nearest that the model carries are 49"."""
    wanted = f"{scene.frames} frames are wanted"
    if scene.seconds is not None:
        wanted = f"{scene.seconds:g} s at {fps:g} fps are {scene.seconds * fps:g} frames"
    return f"{wanted}; the nearest number that the model carries is {num_frames}, {num_frames / fps:.4g} s"


def seed_of(config: InferenceConfig) -> int:
    """Returns the seed of a configuration whose story is resolved."""
    assert config.seed is not None
    return config.seed
