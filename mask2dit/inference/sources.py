"""Scenes that are not generated: given ones, read from videos, and kept ones, taken from an earlier run."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mask2dit.files import open_tensors, read_json
from mask2dit.hashing import fingerprint
from mask2dit.inference.config import InferenceConfig
from mask2dit.models.hub import recorded
from mask2dit.pipelines.story import LATENTS, write_latents
from mask2dit.texts import parse_json, read_text
from mask2dit.video.frames import resize_and_crop, to_uint8
from mask2dit.video.reading import VideoReader, choose_scene, open_video

logger = logging.getLogger(__name__)


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

    @property
    def context(self) -> dict:
        """The video and the frames, for the record."""
        return {"path": self.path, "fingerprint": fingerprint(self.path), "indices": self.indices}


@dataclasses.dataclass(frozen=True)
class KeptScene:
    """A scene that an earlier run wrote, which is taken as it is.

    Raises:
        FileNotFoundError: if one of its files is missing.
    """

    clip: Path
    """Its video. The latents are beside it."""
    prompt: str
    record: dict
    """Its entry in the earlier run's record."""

    def __post_init__(self):
        for path in (self.clip, latents_file(self.clip)):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing, which holds a scene that is kept: generate the story again"
                )

    def __str__(self) -> str:
        return f"kept, {self.clip}"

    @property
    def context(self) -> dict | None:
        return self.record.get("context")

    def load_latents(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Loads the scaled latents, (1, F, C, h, w).

        Raises:
            ValueError: if the file is damaged, or has another shape than the scene of the new story.
        """
        path = latents_file(self.clip)
        with open_tensors(path, "generate the story again") as file:
            latents = file.get_tensor(LATENTS)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"{path} has latents of the shape {tuple(latents.shape)}, but the scene has {shape}: keep height, width, "
                "num_frames and model as they are in the record"
            )
        return latents


def latents_file(clip: Path) -> Path:
    """Returns where the latents of a scene are, given its video."""
    return clip.with_suffix(".safetensors")


def save_latents(clip: Path, latents: torch.Tensor) -> None:
    """Writes a scene's latents beside its video."""
    write_latents(latents_file(clip), latents)


def open_context_videos(videos: Sequence[str]) -> list[tuple[str, VideoReader, range]]:
    """Opens context videos. Returns the video, its reader and the frame indices of each given scene.

    Raises:
        ValueError, FileNotFoundError: if a video cannot be read.
    """
    readers = [(video, open_video(video)) for video in videos]
    return [(video, reader, scene) for video, reader in readers for scene in _scenes_of(video, reader.num_frames)]


def read_given_scene(
    source: tuple[str, VideoReader, range], num_frames: int, config: InferenceConfig, generator: torch.Generator
) -> GivenScene:
    """Reads the frames of a given scene as the model sees them. `config` has its height and width.

    Raises:
        ValueError: if the scene is too short.
    """
    video, reader, scene = source
    indices = choose_scene(scene, video, num_frames, start=config.context_start, generator=generator)
    pixels = resize_and_crop(reader.read(indices), config.height, config.width)
    frames = to_uint8(pixels.add(1).div(2).permute(0, 2, 3, 1).contiguous().numpy())
    return GivenScene(video, indices, frames)


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


def read_kept_scenes(config: InferenceConfig) -> dict[int, KeptScene]:
    """Reads the record of an earlier run. Returns its scenes, by index, that `config.redo` does not make again.

    Raises:
        FileNotFoundError: if the record or a file of a kept scene is missing.
        ValueError: if the record is damaged, or its scenes do not fit the configuration.
    """
    path = Path(config.record)
    if not path.is_file():
        raise FileNotFoundError(f"there is no record {str(path)!r}: redo needs the .json of an earlier run")
    record: Any = read_json(path, "take the record of another run")
    try:
        entries, then = record["scenes"], record["config"]
        prompts = [entry["prompt"] for entry in entries]
        _check_unchanged(path, config, then)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a generated video") from error
    again = _scenes_again(path, config, entries)
    kept = [i for i in range(min(len(entries), len(config.prompts))) if i not in again]
    for i in kept:
        if config.prompts[i] != prompts[i]:
            raise ValueError(
                f"the prompt of scene {i + 1} is not that of {path}: add {i + 1} to redo, or leave the prompt as it was"
            )
    folder = path.with_suffix("")
    return {i: KeptScene(folder / f"scene_{i + 1}.mp4", prompts[i], entries[i]) for i in kept}


def without_old_seeds(config: InferenceConfig) -> InferenceConfig:
    """Returns the configuration without the own seeds of scenes that are made again, if it has another seed than the record:
    with the same noise, they would hardly change."""
    if config.scene_seeds is None or config.record is None:
        return config
    then = read_json(config.record, "take the record of another run")["config"]
    if then.get("seed") == config.seed:
        return config
    seeds = [None if i + 1 in config.redo else seed for i, seed in enumerate(config.scene_seeds)]
    return dataclasses.replace(config, scene_seeds=seeds)


def _check_unchanged(path: Path, config: InferenceConfig, then: dict) -> None:
    """Checks the settings on which the files of kept scenes depend."""
    now = recorded(config)  # a model of the hub by its name, although its local folder is used
    for name in ("model", "fps", "height", "width"):
        if now[name] not in (then[name], None):
            raise ValueError(
                f"{name}={now[name]} is not the {then[name]} of {path}, from which scenes are kept: leave it out"
            )


def _scenes_again(path: Path, config: InferenceConfig, entries: Sequence[dict]) -> set[int]:
    """Returns the indices of the scenes that are generated: named ones, new ones and, if asked, those that follow."""
    num_scenes = len(config.prompts)
    for number in config.redo:
        if number > num_scenes:
            raise ValueError(f"redo names scene {number}, but there are {num_scenes}")
        if number <= len(entries) and (context := entries[number - 1]["context"]):
            raise ValueError(f"redo names scene {number}, which is given ({context['path']}) and not generated")
    again = {number - 1 for number in config.redo} | set(range(len(entries), num_scenes))
    if config.following and again:
        again |= {i for i in range(min(again), len(entries)) if not entries[i]["context"]}
    return again
