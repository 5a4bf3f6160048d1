"""Projects of the studio: folders with a story, its scenes in all their versions, and the films made of them.

    NAME/
      draft.json                the story as it is being written, with the project's settings
      story.yaml                the same as a story file, whenever it is a whole story
      choices.json              the versions that were chosen where it is not the newest
      clips/                    videos of one's own
      scenes/ID/1.mp4, …        the versions of a scene, with latents (.safetensors) and record (.json) beside each
      latents/                  finished scenes, from which an interrupted generation goes on
      films/                    films that were put together, in the form of `mask2dit.inference.output`

A version counts once its record is there, which is written last. Nothing is ever overwritten but the draft and the choices.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch

from mask2dit.config import check_file_name
from mask2dit.files import check_writable, read_json, write_text
from mask2dit.hashing import digest
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.output import claim_output
from mask2dit.inference.sources import KeptScene, save_latents
from mask2dit.stories import Scene, Story, write_story
from mask2dit.stories.story import complete_prompt
from mask2dit.video.reading import open_video
from mask2dit.video.writing import write_video

REMEDY = "move the file away, or restore it"
DRAFT, CHOICES, STORY = "draft.json", "choices.json", "story.yaml"
CLIPS, SCENES, LATENTS, FILMS = "clips", "scenes", "latents", "films"
MAX_SCENES = 100
# The first bytes of containers that can be uploaded. Others, such as playlists, could name further files to read.
CONTAINERS = (rb"....ftyp", rb"\x1a\x45\xdf\xa3", rb"RIFF....AVI ")


class StaleDraftError(ValueError):
    """The draft was saved in another tab meanwhile."""


@dataclass(frozen=True, kw_only=True)
class DraftScene:
    """A scene as it is being written; it may be empty."""

    prompt: str = ""
    seconds: float | None = None
    """Length in seconds; None: the model's."""
    seed: int | None = None
    """Seed of the initial noise; None: a new one each time."""
    video: str | None = None
    """File in the project's `clips`, for a given scene; None: the scene is generated."""
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Name of the folder of its versions, whatever its place in the story."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A story as it is being written; unlike a `Story`, it may be incomplete."""

    title: str = "Untitled"
    style: str = ""
    negative: str = ""
    cast: tuple[tuple[str, str], ...] = ()
    """Names and descriptions in order."""
    scenes: tuple[DraftScene, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `InferenceConfig` with values other than the model's defaults."""
    revision: int = 0
    """Number of times that it was saved."""
    saved_by: str = ""
    """The tab that saved it last."""

    def story(self) -> Story:
        """Returns the whole story.

        Raises:
            ValueError: if something is missing or does not fit; the message names it.
        """
        if not self.scenes:
            raise ValueError("the story has no scenes: add one")
        names = [name for name, _ in self.cast]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is in the cast twice: give each actor a name of its own")
        scenes = [
            Scene(
                prompt=scene.prompt.strip(),
                seconds=scene.seconds,
                seed=scene.seed,
                video=scene.video and f"{CLIPS}/{scene.video}",
            )
            for scene in self.scenes
        ]
        return Story(
            title=self.title.strip(),
            style=self.style.strip(),
            negative=self.negative.strip(),
            cast=dict(self.cast),
            scenes=tuple(scenes),
        )

    def prompts(self) -> list[str]:
        """Returns the prompts that the model gets, also where the story is not whole yet."""
        cast, style = dict(self.cast), self.style.strip()
        return [complete_prompt(scene.prompt.strip(), cast, style) for scene in self.scenes]

    def with_story(self, story: Story) -> "Draft":
        """Returns the draft with a story's content. A scene keeps its versions where the story has the same prompt."""
        versions = {scene.prompt: scene.id for scene in reversed(self.scenes)}
        scenes = []
        for scene in story.scenes:
            known = {"id": versions.pop(scene.prompt)} if scene.prompt in versions else {}
            scenes.append(DraftScene(prompt=scene.prompt, seconds=scene.seconds, seed=scene.seed, **known))
        cast = tuple(story.cast.items())
        return replace(
            self, title=story.title, style=story.style, negative=story.negative, cast=cast, scenes=tuple(scenes)
        )

    def with_scene(self, index: int, scene: DraftScene) -> "Draft":
        """Returns the draft with another scene at an index."""
        return replace(self, scenes=(*self.scenes[:index], scene, *self.scenes[index + 1 :]))

    def insert_scene(self, index: int, scene: DraftScene) -> "Draft":
        """Returns the draft with a new scene before an index.

        Raises:
            ValueError: if there are too many.
        """
        if len(self.scenes) >= MAX_SCENES:
            raise ValueError(f"a story has at most {MAX_SCENES} scenes here: begin a new project for the next part")
        return replace(self, scenes=(*self.scenes[:index], scene, *self.scenes[index:]))

    def remove_scene(self, index: int) -> "Draft":
        """Returns the draft without a scene. Its versions stay in the project's folder."""
        return replace(self, scenes=(*self.scenes[:index], *self.scenes[index + 1 :]))


@dataclass(frozen=True)
class Version:
    """A scene as it was made at one time."""

    number: int
    """Counted from 1."""
    clip: Path
    record: dict
    """What it was made from: prompt, seed, seconds, source, context and run."""

    @property
    def kept(self) -> KeptScene:
        return KeptScene(self.clip, self.record["prompt"], self.record)


class Project:
    """A project in its folder. All tabs and jobs of a process share one object per project."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = RLock()

    @property
    def name(self) -> str:
        return self.folder.name

    def load(self) -> Draft:
        """Reads the draft.

        Raises:
            ValueError: if its file is damaged.
        """
        path = self.folder / DRAFT
        record: Any = read_json(path, REMEDY)
        try:
            scenes = tuple(DraftScene(**scene) for scene in record["scenes"])
            cast = tuple((name, text) for name, text in record["cast"])
            return Draft(**{**record, "scenes": scenes, "cast": cast})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error

    def save(self, draft: Draft, tab: str = "") -> Draft:
        """Writes the draft, and the story file if it is a whole story. Returns it with its new revision.

        Args:
            draft: the draft; its `revision` is that of the draft that was changed.
            tab: who saves it. One tab may save twice from the same draft, as when a person types on while it saves.

        Raises:
            StaleDraftError: if another tab saved meanwhile.
            OSError: if the disk is full; the earlier draft stays.
        """
        with self._lock:
            earlier = self.load() if (self.folder / DRAFT).is_file() else draft
            if draft == replace(earlier, revision=draft.revision, saved_by=draft.saved_by) and earlier is not draft:
                return earlier
            if earlier.revision != draft.revision and earlier.saved_by != tab:
                raise StaleDraftError(
                    "this project was changed in another tab meanwhile: reload the page, then change it again"
                )
            draft = replace(draft, revision=earlier.revision + 1, saved_by=tab)
            write_text(self.folder / DRAFT, json.dumps(asdict(draft), indent=2, ensure_ascii=False) + "\n")
            try:
                story = draft.story()
            except ValueError:  # not whole yet; the draft is saved
                (self.folder / STORY).unlink(missing_ok=True)
                return draft
            write_story(self.folder / STORY, story)
            return draft

    @property
    def story_file(self) -> Path | None:
        """The story file, if the draft is a whole story."""
        path = self.folder / STORY
        return path if path.is_file() else None

    def versions(self, scene: str) -> list[Version]:
        """Returns the versions of a scene, oldest first."""
        folder = self.folder / SCENES / scene
        paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
        return [Version(int(path.stem), path.with_suffix(".mp4"), read_json(path, REMEDY)) for path in paths]

    def chosen(self, scene: str) -> Version | None:
        """Returns the version that the film shows: the chosen one, else the newest. None if there is none."""
        versions = self.versions(scene)
        number = self._choices().get(scene)
        return next((version for version in versions if version.number == number), versions[-1] if versions else None)

    def choose(self, scene: str, number: int | None) -> None:
        """Chooses a version; None: the newest, also of those to come.

        Raises:
            ValueError: if there is no such version.
        """
        with self._lock:
            if number is not None and number not in [version.number for version in self.versions(scene)]:
                raise ValueError(f"this scene has no version {number}")
            choices = self._choices()
            choices.pop(scene, None)
            if number is not None:
                choices[scene] = number
            write_text(self.folder / CHOICES, json.dumps(choices, indent=2) + "\n")

    def add_version(self, scene: str, frames: np.ndarray, latents: torch.Tensor, fps: int, record: dict) -> Version:
        """Writes a new version of a scene, uint8 (frames, H, W, 3) and (1, F, C, h, w), and chooses it.

        Raises:
            OSError: if the disk is full; no part of the version stays.
        """
        folder = self.folder / SCENES / scene
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [version.number for version in self.versions(scene)]
            clip = folder / f"{max(numbers, default=0) + 1}.mp4"
            write_video(clip, frames, fps)
            save_latents(clip, latents)
            record = {**record, "fps": fps, "num_frames": len(frames), "size": list(frames.shape[1:3])}
            write_text(clip.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            self.choose(scene, None)
        return Version(int(clip.stem), clip, record)

    def add_clip(self, upload: Path, max_megabytes: float, max_seconds: float) -> str:
        """Copies a video of one's own into the project. Returns the name of the copy.

        Raises:
            ValueError: if it is not a video, or too large or long.
            OSError: if the disk is full.
        """
        check_clip(upload, max_megabytes, max_seconds)
        folder = self.folder / CLIPS
        folder.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w-]+", "-", upload.stem).strip("-")[:60] or "clip"
        name = f"{stem}-{secrets.token_hex(3)}{upload.suffix.lower()}"
        try:
            shutil.copyfile(upload, folder / name)
        except OSError:
            (folder / name).unlink(missing_ok=True)
            raise
        return name

    def export(self, draft: Draft) -> Path:
        """Puts the film together from the chosen versions. Returns its path; sheet and record are beside it.

        The clips are joined as they are. The same choice is put together only once.

        Raises:
            ValueError: if a scene is missing, or was made at another size or frame rate.
            OSError: if the disk is full.
        """
        versions = [self.chosen(scene.id) for scene in draft.scenes]
        missing = [str(number) for number, version in enumerate(versions, start=1) if version is None]
        if missing or not versions:
            raise ValueError(f"scene {', '.join(missing) or 1} is not made yet: generate it, then get the film")
        first = versions[0].record
        for number, version in enumerate(versions, start=1):
            for key in ("size", "fps"):
                if version.record[key] != first[key]:
                    raise ValueError(
                        f"scene {number} has the {key} {version.record[key]}, but scene 1 {first[key]}: make it again"
                    )
        name = digest([[str(version.clip.relative_to(self.folder)) for version in versions], draft.title])
        film = self.folder / FILMS / f"{name}.mp4"
        with self._lock:
            if not film.is_file():
                self._write_film(film, versions, draft.title)
        return film

    def _write_film(self, film: Path, versions: Sequence[Version], title: str) -> None:
        check_writable(film.parent)
        shutil.rmtree(film.with_suffix(""), ignore_errors=True)  # of a process that was killed
        records = [version.record for version in versions]
        of_last = max(records, key=lambda record: record["finished"])["run"]
        settings = {
            **of_last["config"],
            "prompts": [record["prompt"] for record in records],
            "num_frames": [record["num_frames"] for record in records],
            "scene_seeds": [record["seed"] for record in records],
            "height": records[0]["size"][0],
            "width": records[0]["size"][1],
            "fps": records[0]["fps"],
            "save_path": str(film.parent),
            "name": film.stem,
        }
        config = InferenceConfig(
            **{key: settings[key] for key in ("prompts", "num_frames", "height", "width", "fps", "save_path", "name")}
        )
        entries, stop = [], 0
        for record in records:
            start, stop = stop, stop + record["num_frames"]
            entries.append({key: value for key, value in record.items() if key != "run"} | {"frames": [start, stop]})
        with claim_output(config) as files:
            for version in versions:
                files.keep_scene(version.kept)
            given = [i for i, record in enumerate(records) if record["context"]]
            files.finish(given, title, {**of_last, "config": settings, "scenes": entries})

    def _choices(self) -> dict[str, int]:
        path = self.folder / CHOICES
        return read_json(path, REMEDY) if path.is_file() else {}


class Projects:
    """All projects in a folder.

    Args:
        folder: the folder, which is created.

    Raises:
        OSError: if it cannot be written in.
    """

    def __init__(self, folder: str | Path):
        check_writable(folder)
        self.folder = Path(folder).resolve()
        self._open: dict[str, Project] = {}
        self._lock = RLock()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.parent.name for path in self.folder.glob(f"*/{DRAFT}")))

    def open(self, name: str) -> Project:
        """Opens a project.

        Raises:
            ValueError: if there is none of this name.
        """
        if not name or name not in list(self):  # a name with a path in it is in no list of names
            raise ValueError(f"there is no project {str(name)[:60]!r}")
        with self._lock:
            return self._open.setdefault(name, Project(self.folder / name))

    def create(self, draft: Draft) -> Project:
        """Creates a project, named after the story's title.

        Raises:
            ValueError: if the title cannot name a folder.
            OSError: if the disk is full.
        """
        name = re.sub(r"[\W_]+", "-", draft.title.lower()).strip("-")[:60] or "project"
        check_file_name("title", name, "")
        with self._lock:
            taken = {path.name for path in self.folder.iterdir()}
            number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
            folder = self.folder / (name if number == 1 else f"{name}-{number}")
            folder.mkdir()
            try:
                Project(folder).save(draft)
            except OSError:
                shutil.rmtree(folder)
                raise
        return self.open(folder.name)


def check_clip(path: Path, max_megabytes: float, max_seconds: float) -> None:
    """Checks an uploaded video.

    Raises:
        ValueError: if it is not a video, or too large or long.
    """
    megabytes = path.stat().st_size / 1e6
    if megabytes > max_megabytes:
        raise ValueError(f"{path.name} has {megabytes:.0f} MB, but at most {max_megabytes:g} MB can be uploaded")
    with path.open("rb") as file:
        start = file.read(16)
    if not any(re.match(container, start, re.DOTALL) for container in CONTAINERS):
        raise ValueError(f"{path.name} is not a video in an MP4, MOV, WebM, MKV or AVI file")
    try:
        reader = open_video(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is not a video that can be read: encode it again") from error
    seconds = reader.num_frames / reader.fps
    if seconds > max_seconds:
        raise ValueError(f"{path.name} lasts {seconds:.0f} s, but at most {max_seconds:g} s can be uploaded: cut it")
