"""Generation for the studio: from a draft to a checked plan, and from a plan to versions of scenes."""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from PIL import Image

from mask2dit.device import choose_device
from mask2dit.inference import run as inference
from mask2dit.inference.check import load_text_model
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.from_story import scene_frames
from mask2dit.inference.run import InferencePlan, LoadedModel
from mask2dit.inference.sources import GivenScene, KeptScene, open_context_videos, read_given_scene
from mask2dit.models.hub import fetch_model, is_hub_name, local_model, origin, recorded
from mask2dit.pipelines.events import Event, Observer, PreviewMade, SceneFinished, SceneStarted, StepFinished
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.memory import MEMORY_MODES
from mask2dit.pipelines.story import SceneStore
from mask2dit.stories import ACTOR, Scene, Story
from mask2dit.storyworld.prompts import MARKER, check_prompts
from mask2dit.studio.project import CLIPS, LATENTS, SCENES, Draft, DraftScene, Project, Version
from mask2dit.video.writing import write_image

PREVIEW = "preview.png"  # in a scene's folder, while it is being made
# The settings that the page shows, in its order: keys of `InferenceConfig`.
SETTINGS = (
    "model",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "window",
    "context",
    "context_refresh",
    "num_frames",
    "height",
    "width",
    "fps",
    "memory",
    "dtype",
    "preview_every",
)
OF_SMALL_WORLD = {
    "sampler": "dpm",
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "dtype": "float32",
    "window": 3,
    "preview_every": 2,
}
OF_OTHERS = {"window": 3, "preview_every": 5}
SEEDS = 2**31


@dataclass(frozen=True)
class StudioPlan:
    """A checked generation."""

    project: Project
    plan: InferencePlan
    places: tuple[int, ...]
    """Index in the draft of each scene of the plan. Scenes that are neither made nor given are left out."""
    scenes: tuple[DraftScene, ...]
    """The scenes of the plan."""
    seeds: tuple[int | None, ...]
    """Seeds of the initial noise of the scenes that get a new version; None: the scene is kept."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the scenes that get a new version."""
        return tuple(scene.id for scene, seed in zip(self.scenes, self.seeds) if seed is not None)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of these scenes in the story, counted from 1."""
        return tuple(place + 1 for place, seed in zip(self.places, self.seeds) if seed is not None)


class Engine:
    """Holds the model that was used last, so that a second scene does not load it again.

    Args:
        device: as `InferenceConfig.device`.
    """

    def __init__(self, device: str = "auto"):
        self.device = device
        self._skeletons: dict[str, tuple[str, Mask2DiTPipeline]] = {}
        self._loaded: tuple[str, LoadedModel] | None = None
        self._lock = RLock()

    def find_model(self, model: str) -> tuple[str, Mask2DiTPipeline]:
        """Returns the local folder of a model, and the model without its weights. Of a model of the Hugging Face Hub, only
        configurations and tokenizer are fetched: the weights are when they are loaded.

        Raises:
            OSError, ValueError: if it is missing, damaged or cannot be fetched.
        """
        with self._lock:
            if model not in self._skeletons:
                if is_hub_name(model):
                    folder = str(fetch_model(model, configs_only=True))
                    self._skeletons[model] = folder, load_text_model(folder)
                else:
                    self._skeletons[model] = model, inference.load_skeleton(model)
            return self._skeletons[model]

    def skeleton(self, model: str) -> Mask2DiTPipeline:
        """Returns a model without its weights. Raises as `find_model`."""
        return self.find_model(model)[1]

    def count_tokens(self, model: str, prompts: Collection[str]) -> list[int]:
        """Counts the tokens of prompts."""
        tokenizer = self.skeleton(model).tokenizer
        return [len(tokenizer(prompt).input_ids) for prompt in prompts]

    def text_window(self, model: str) -> int:
        """Returns the number of tokens that the model reads of a prompt."""
        return self.skeleton(model).transformer.config.max_text_seq_length

    def plan(
        self, project: Project, draft: Draft, again: Collection[int] | None = None, following: bool = False
    ) -> StudioPlan:
        """Checks a generation without reading weights.

        Args:
            project: the project.
            draft: its draft.
            again: indices of the scenes to make; all others are given, as far as they exist. None: all scenes that do not
                exist as the draft has them. Own clips that do not are brought up to date either way.
            following: True also makes the scenes that follow those again.

        Raises:
            ValueError, OSError: for whatever cannot be generated, with the remedy.
        """
        count, prompts = len(draft.scenes), draft.prompts()
        if not count:
            raise ValueError("the story has no scenes: add one")
        for index in again or ():
            if not 0 <= index < count:
                raise ValueError(f"there is no scene {index + 1}: the story has {count}")
        sized, skeleton = self._configure(project, draft, range(count), ["A scene."] * count)
        kept = _kept(project, draft, sized, also_changed=again is not None)
        wanted = set(range(count)) - kept.keys() if again is None else set(again)
        if following and wanted:
            wanted |= {i for i in range(min(wanted), count) if draft.scenes[i].video is None}
        if not wanted:
            raise ValueError("all scenes are made: change one, or choose a scene to make again")
        wanted |= {i for i in range(count) if draft.scenes[i].video is not None and i not in kept}
        for place in sorted(wanted):
            if fault := self.find_fault(draft, place):
                raise ValueError(f"scene {place + 1}: {fault}")
        places = [i for i in range(count) if i in wanted or i in kept]
        texts = [prompts[place] if place in wanted else kept[place].record["prompt"] for place in places]
        config, _ = self._configure(project, draft, places, texts)
        shape = skeleton.video_shape(config.height, config.width, config.num_frames, len(places))
        sources: dict[int, GivenScene | KeptScene] = {}
        for i, place in enumerate(places):
            scene = draft.scenes[place]
            if place not in wanted:
                sources[i] = kept[place].kept
            elif scene.video is not None:
                source = open_context_videos([str(project.folder / CLIPS / scene.video)])[0]
                sources[i] = read_given_scene(source, shape.frames[i], config, torch.Generator().manual_seed(0))
        scenes = tuple(draft.scenes[place] for place in places)
        own = [scene.seed if scene.seed is not None else _new_seed() for scene in scenes]
        seeds = tuple(seed if place in wanted else None for place, seed in zip(places, own))
        config = replace(config, scene_seeds=list(seeds))
        if not sources and len(places) <= (config.window or len(places)):
            config = replace(config, context_refresh=1)  # nothing is given whose keys and values could be kept
        plan = inference.plan_generation(config, choose_device(self.device), skeleton, sources)
        return StudioPlan(project, plan, tuple(places), scenes, seeds)

    def run(self, planned: StudioPlan, observer: Observer) -> None:
        """Makes the scenes of a plan. Each becomes a version as soon as it is done.

        Args:
            planned: the plan.
            observer: called with events, whose scenes are indices in the draft.

        Raises:
            Cancelled: if the observer raises it; versions that were done stay.
            OSError: if the disk is full, likewise.
        """
        project, plan = planned.project, planned.plan

        def observe(event: Event) -> None:
            if isinstance(event, PreviewMade):
                folder = project.folder / SCENES / planned.scenes[event.scene].id
                folder.mkdir(parents=True, exist_ok=True)
                write_image(folder / PREVIEW, Image.fromarray(event.image))
            if isinstance(event, StepFinished):
                observer(replace(event, scenes=tuple(planned.places[scene] for scene in event.scenes)))
            else:
                clock.see(event)
                observer(replace(event, scene=planned.places[event.scene]))

        clock = _Clock()
        try:
            model = self._load(plan.config)
            store = SceneStore(project.folder / LATENTS, model.identity)
            clock.lap()
            for i, made in enumerate(inference.make_scenes(plan, model, store, observe)):
                if planned.seeds[i] is not None:
                    version = self._add_version(planned, i, made, model, clock.lap())
                    self._remove_preview(project, planned.scenes[i])
                    observe(SceneFinished(i, version.clip, made.origin))
        finally:
            for scene in planned.scenes:
                self._remove_preview(project, scene)

    def find_fault(self, draft: Draft, place: int) -> str:
        """Says in one sentence why a scene cannot be generated; empty: it can."""
        try:
            story = part_of(draft, place).story()
            check_prompts(self.find_model(settings_of(draft)["model"])[0], story.prompts, None)
        except (ValueError, OSError) as error:
            message = str(error).removeprefix(f"story {draft.title.strip()!r}, ")
            return message.removeprefix("scene 1: ")
        return ""

    def find_faults(self, draft: Draft) -> list[str]:
        """Says for each scene why it cannot be generated, or what of its prompt is cut off; empty: nothing."""
        faults = []
        model = settings_of(draft)["model"]
        try:
            self.find_model(model)
        except (ValueError, OSError) as error:  # once, since a hub may be slow to answer
            return [str(error)] * len(draft.scenes)
        for place, prompt in enumerate(draft.prompts()):
            fault = self.find_fault(draft, place)
            if not fault:
                (tokens,), window = self.count_tokens(model, [prompt]), self.text_window(model)
                if tokens > window:
                    fault = f"the prompt has {tokens} tokens, but the model reads {window}: shorten it by {tokens - window}"
            faults.append(fault)
        return faults

    def _configure(
        self, project: Project, draft: Draft, places: Sequence[int], prompts: Sequence[str]
    ) -> tuple[InferenceConfig, Mask2DiTPipeline]:
        """Returns the configuration of some scenes of a draft, with the model's folder and size, and the model without
        weights."""
        settings = settings_of(draft)
        folder, skeleton = self.find_model(settings["model"])
        lengths = tuple(Scene(prompt="A scene.", seconds=draft.scenes[place].seconds) for place in places)
        height, width, num_frames = skeleton.fill_size(settings["height"], settings["width"], settings["num_frames"])
        frames = scene_frames(skeleton, Story(title="lengths", scenes=lengths), settings["fps"], num_frames)
        config = InferenceConfig(
            **{
                **settings,
                "model": folder,
                "prompts": list(prompts),
                "negative_prompt": draft.negative.strip(),
                "height": height,
                "width": width,
                "num_frames": [frames] * len(places) if isinstance(frames, int) else frames,
                "seed": _new_seed(),
                "device": self.device,
                "save_path": str(project.folder),
            }
        )
        return config, skeleton

    def _load(self, config: InferenceConfig) -> LoadedModel:
        """Loads the model of a configuration, unless it is the one that is loaded."""
        names = ("model", "dtype", "memory", "sampler", "mask_variant", "attention_backend", "vae_tiling", "compile")
        key = repr([getattr(config, name) for name in names])
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees its memory first
            config = local_model(replace(config, **origin(config.model)))  # of the hub, fetches the weights
            self._loaded = (key, inference.load_model(config, choose_device(self.device)))
        return self._loaded[1]

    @staticmethod
    def _add_version(
        planned: StudioPlan, i: int, made: inference.MadeScene, model: LoadedModel, seconds: float
    ) -> Version:
        config, scene = planned.plan.config, planned.scenes[i]
        record = {
            "prompt": config.prompts[i],
            "text": scene.prompt,
            "seed": None if made.source else planned.seeds[i],
            "source": made.origin,
            "video": scene.video,
            "context": made.source and made.source.context,
            "seconds": round(seconds, 1),
            "finished": time.time(),
            "run": inference.describe_run(planned.plan, model),
        }
        return planned.project.add_version(scene.id, made.frames, made.latents, config.fps, record)

    @staticmethod
    def _remove_preview(project: Project, scene: DraftScene) -> None:
        (project.folder / SCENES / scene.id / PREVIEW).unlink(missing_ok=True)


class _Clock:
    """Measures the seconds of each scene: its share of the window's denoising, and its own decoding."""

    def __init__(self):
        self.last = time.time()
        self.started, self.share = 0, 0.0

    def see(self, event: Event) -> None:
        self.started += isinstance(event, SceneStarted)

    def lap(self) -> float:
        """Returns the seconds of the scene that is done."""
        now = time.time()
        elapsed, self.last = now - self.last, now
        if self.started:  # the first scene of a window
            self.share, self.started = elapsed / self.started, 0
            return self.share
        return self.share + elapsed


def default_settings(model: str) -> dict[str, Any]:
    """Returns the values of `SETTINGS` for a model."""
    defaults = {entry.name: entry.default for entry in fields(InferenceConfig)}
    special = OF_SMALL_WORLD if (Path(model) / MARKER).is_file() else OF_OTHERS
    return {**{name: defaults[name] for name in SETTINGS}, **special, "model": model}


def settings_of(draft: Draft) -> dict[str, Any]:
    """Returns the values of `SETTINGS` for a draft."""
    own = {name: value for name, value in draft.settings.items() if name in SETTINGS}
    return {**default_settings(own["model"]), **own}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises `ValueError`, naming the key, for a value that cannot work."""
    InferenceConfig(**settings, prompts=["a scene"])
    if settings["memory"] not in MEMORY_MODES:
        raise ValueError(f"memory has to be one of {', '.join(MEMORY_MODES)}, but is {settings['memory']!r}")


def find_models(folder: str | os.PathLike) -> list[str]:
    """Returns the model folders in a folder."""
    return sorted(str(path.parent) for path in Path(folder).glob("*/transformer") if path.is_dir())


def _fits(version: Version, num_frames: int, config: InferenceConfig) -> bool:
    """Returns True if a version has the length, size and model of the story as it is now."""
    record = version.record
    of_version = (record["num_frames"], record["size"], record["fps"], record["run"]["config"]["model"])
    return of_version == (num_frames, [config.height, config.width], config.fps, recorded(config)["model"])


def part_of(draft: Draft, place: int) -> Draft:
    """Returns a draft with one of the scenes, without actors who are only in others."""
    scene = draft.scenes[place]
    named, known = set(ACTOR.findall(scene.prompt)), {name for name, _ in draft.cast}
    if named <= known:
        cast = tuple((name, text) for name, text in draft.cast if name in named or not ACTOR.fullmatch(name))
        return replace(draft, scenes=(scene,), cast=cast)
    return replace(draft, scenes=(scene,))


def _kept(project: Project, draft: Draft, config: InferenceConfig, also_changed: bool) -> dict[int, Version]:
    """Returns the chosen versions, by index, that can be given: with the size and model of the story as it is now.

    Args:
        project: the project.
        draft: its draft.
        config: the configuration of all its scenes.
        also_changed: True also returns versions that were made from another prompt than the draft's. Not of own clips, which
            stay the same pictures, so that the new prompt describes them better.
    """
    kept = {}
    for i, (scene, prompt) in enumerate(zip(draft.scenes, draft.prompts())):
        version = project.chosen(scene.id)
        if (
            version is not None
            and _fits(version, config.num_frames[i], config)
            and version.record["video"] == scene.video
            and (version.record["prompt"] == prompt or (also_changed and scene.video is None))
        ):
            kept[i] = version
    return kept


def _new_seed() -> int:
    return int.from_bytes(os.urandom(4), "little") % SEEDS
