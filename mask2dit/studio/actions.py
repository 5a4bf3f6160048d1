"""What the studio can do, for the page and for programs alike. Nothing here knows of a browser."""

import os
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mask2dit.endpoint import Endpoint
from mask2dit.optional import import_optional
from mask2dit.stories import Story, read_story
from mask2dit.stories.writer import StoryRequest, ask_for_story
from mask2dit.studio.config import StudioConfig
from mask2dit.studio.engine import PREVIEW, Engine, check_settings, default_settings, find_models, settings_of
from mask2dit.studio.jobs import Job, JobQueue
from mask2dit.studio.project import MAX_SCENES, SCENES, Draft, DraftScene, Projects, Version

ATTEMPTS = 3  # answers of the writer until one is valid
FOX = "a red fox, wearing a blue scarf"
EXAMPLES: dict[str, dict[str, Any]] = {
    "small world: a walk on the beach": {
        "title": "A walk on the beach",
        "cast": (("Actor1", "green triangle, wearing a hat"),),
        "prompts": (
            "Actor1 moves right along the beach.",
            "Actor1 stands still on the beach.",
            "Actor1 jumps on the beach.",
        ),
    },
    "small world: two friends in the snow": {
        "title": "Two friends in the snow",
        "cast": (("Actor1", "red circle, wearing a scarf"), ("Actor2", "blue square, wearing boots")),
        "prompts": (
            "Actor1 moves right and Actor2 stands still in the snow.",
            "Actor1 and Actor2 move towards each other in the snow.",
            "Actor1 jumps and Actor2 jumps in the snow.",
        ),
    },
    "for trained models: a fox in winter": {
        "title": "A fox in winter",
        "style": "soft watercolour animation",
        "cast": (("Actor1", FOX),),
        "prompts": (
            "Actor1 wakes up in a hollow tree while snow falls outside.",
            "Actor1 trots across a white field at sunrise, leaving a line of tracks.",
            "Actor1 looks at its reflection in a frozen lake.",
        ),
    },
}


@dataclass(frozen=True, kw_only=True)
class SceneView:
    """A scene as the page shows it."""

    number: int
    scene: DraftScene
    chosen: Version | None
    versions: Sequence[Version]
    is_changed: bool
    """True if the chosen version was made from another prompt."""
    preview: Path | None
    """The last preview, while the scene is being made."""


@dataclass(frozen=True, kw_only=True)
class ProjectView:
    """A project as the page shows it."""

    name: str
    draft: Draft
    scenes: Sequence[SceneView]
    job: Job | None
    ahead: int
    """Number of jobs before this project's."""
    seconds_per_scene: float | None
    """Median of the scenes that were made with these settings; None: there are none."""


class Studio:
    """All projects, the queue and the model.

    Args:
        config: the settings.

    Raises:
        OSError: if the folder of projects cannot be written in.
    """

    def __init__(self, config: StudioConfig):
        self.config = config
        self.projects = Projects(config.projects)
        self.engine = Engine(config.device)
        self.queue = JobQueue(self.projects.folder)

    def models(self) -> list[str]:
        """Returns the models to choose from: those beside the default one."""
        return sorted({self.config.model, *find_models(Path(self.config.model).parent)})

    def create(self, draft: Draft | None = None) -> str:
        """Creates a project, by default an empty one. Returns its name."""
        draft = draft or Draft(scenes=(DraftScene(),))
        draft = replace(draft, settings={"model": self.config.model, **draft.settings})
        # All of them, as the page saves them: a page that is filled in changes nothing.
        return self.projects.create(replace(draft, settings=settings_of(draft))).name

    def create_example(self, name: str) -> str:
        """Creates a project with one of `EXAMPLES`. Returns its name."""
        if name not in EXAMPLES:
            raise ValueError(f"there is no example {str(name)[:60]!r}")
        example = dict(EXAMPLES[name])
        scenes = tuple(DraftScene(prompt=prompt) for prompt in example.pop("prompts"))
        return self.create(Draft(**example, scenes=scenes))

    def open_story(self, path: str | os.PathLike) -> str:
        """Creates a project from a story file. Returns its name.

        Raises:
            ValueError: if the file is faulty, or gives videos, which a page cannot read from the file's folder.
        """
        story = read_story(path)
        if any(scene.video for scene in story.scenes):
            raise ValueError("the story gives videos, which are not in its file: leave them out, and insert them here")
        return self.create(Draft().with_story(story))

    def create_from_text(self, text: str) -> str:
        """Creates a project from the text of a story file. Returns its name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "story.yaml"
            path.write_text(text, encoding="utf-8")
            try:
                return self.open_story(path)
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), "story")) from error

    @property
    def has_writer(self) -> bool:
        return bool(self.config.writer_base_url)

    def write(self, idea: str, num_scenes: int) -> str:
        """Creates a project with a story that a language model writes. Returns its name.

        Raises:
            ValueError: if there is no writer, or no answer is valid; prompts that the model cannot show are fed back.
            OSError: if the endpoint does not answer.
        """
        config = self.config
        if not self.has_writer:
            raise ValueError("no writer is set: start the studio with writer_base_url and writer_model")
        idea = " ".join((idea or "").split())
        if not idea:
            raise ValueError("write what the story is about")
        if not num_scenes or not 1 <= num_scenes <= MAX_SCENES:
            raise ValueError(f"the number of scenes has to lie between 1 and {MAX_SCENES}")
        empty = Draft(settings={"model": config.model})

        def check(story: Story) -> None:
            for number, fault in enumerate(self.engine.find_faults(empty.with_story(story)), start=1):
                if fault:
                    raise ValueError(f"scene {number}: {fault}")

        import_optional("openai", "evaluation")
        endpoint = Endpoint(
            config.writer_base_url,
            config.writer_model,
            config.writer_api_key_env,
            config.writer_timeout,
            max_retries=1,
        )
        request = StoryRequest(num_scenes=num_scenes, idea=idea)
        return self.create(empty.with_story(ask_for_story(endpoint.ask, request, check, ATTEMPTS)))

    def scene_id(self, name: str, index: int) -> str:
        """Returns the id of a scene. Raises `ValueError` if there is no such scene."""
        scenes = self.projects.open(name).load().scenes
        if not 0 <= index < len(scenes):
            raise ValueError(f"there is no scene {index + 1}: the story has {len(scenes)}")
        return scenes[index].id

    def set_prompt(self, name: str, index: int, prompt: str) -> None:
        """Changes the prompt of a scene."""
        self.scene_id(name, index)
        draft = self.projects.open(name).load()
        self.update(name, draft.with_scene(index, replace(draft.scenes[index], prompt=prompt)))

    def view(self, name: str) -> ProjectView:
        """Returns everything that the page shows of a project."""
        project = self.projects.open(name)
        draft = project.load()
        scenes = []
        for number, (scene, prompt) in enumerate(zip(draft.scenes, draft.prompts()), start=1):
            chosen = project.chosen(scene.id)
            preview = project.folder / SCENES / scene.id / PREVIEW
            scenes.append(
                SceneView(
                    number=number,
                    scene=scene,
                    chosen=chosen,
                    versions=project.versions(scene.id),
                    is_changed=chosen is not None and chosen.record["prompt"] != prompt,
                    preview=preview if preview.is_file() else None,
                )
            )
        job = self.queue.of_project(name)
        return ProjectView(
            name=name,
            draft=draft,
            scenes=scenes,
            job=job,
            ahead=self.queue.ahead(job) if job and job.is_open else 0,
            seconds_per_scene=_seconds_per_scene(draft, scenes),
        )

    def update(self, name: str, draft: Draft, tab: str = "") -> Draft:
        """Saves a changed draft, after checking its settings."""
        check_settings(settings_of(draft))
        return self.projects.open(name).save(draft, tab)

    def set_model(self, draft: Draft, model: str) -> Draft:
        """Returns the draft with another model and that model's settings.

        Raises:
            OSError, ValueError: if the model is missing or damaged, or cannot be fetched.
        """
        folder, _ = self.engine.find_model(model)
        return replace(draft, settings={**default_settings(folder), "model": model})

    def generate(self, name: str, again: Collection[int] | None = None, following: bool = False) -> Job:
        """Puts a generation into the queue.

        Args:
            name: the project.
            again: indices of the scenes to make. None: all that do not exist as the draft has them.
            following: True also makes the scenes that follow those again.

        Raises:
            ValueError, OSError: if it cannot be generated, with the remedy.
        """
        project = self.projects.open(name)
        planned = self.engine.plan(project, project.load(), again, following)
        job = Job(project=name, scenes=planned.ids, numbers=planned.numbers)
        return self.queue.submit(job, lambda _, observe: self.engine.run(planned, observe))

    def choose(self, name: str, scene: str, number: int, tab: str = "") -> Draft:
        """Chooses a version of a scene, whose prompt becomes the draft's. Returns the draft."""
        project = self.projects.open(name)
        project.choose(scene, number)
        draft = project.load()
        version = next(version for version in project.versions(scene) if version.number == number)
        scenes = tuple(
            replace(entry, prompt=version.record["text"], video=version.record["video"])
            if entry.id == scene
            else entry
            for entry in draft.scenes
        )
        return draft if scenes == draft.scenes else project.save(replace(draft, scenes=scenes), tab)

    def insert_clip(self, name: str, draft: Draft, index: int, path: str | os.PathLike) -> Draft:
        """Returns the draft with a video of one's own as a given scene before an index."""
        config = self.config
        video = self.projects.open(name).add_clip(Path(path), config.max_upload_mb, config.max_upload_seconds)
        like = draft.scenes[min(index, len(draft.scenes) - 1)].prompt if draft.scenes else "A scene."
        return draft.insert_scene(index, DraftScene(prompt=like, video=video))

    def export(self, name: str) -> Mapping[str, Path]:
        """Puts the film together. Returns its path and those of the sheet, the record and, if small, an enlarged film."""
        project = self.projects.open(name)
        film = project.export(project.load())
        files = {"film": film, "sheet": film.with_suffix(".png"), "record": film.with_suffix(".json")}
        enlarged = next(film.parent.glob(f"{film.stem}_*x.mp4"), None)
        return {**files, **({"enlarged": enlarged} if enlarged else {})}


def _seconds_per_scene(draft: Draft, scenes: Sequence[SceneView]) -> float | None:
    settings = settings_of(draft)
    names = ("model", "num_inference_steps", "height", "width")
    seconds = [
        version.record["seconds"]
        for view in scenes
        for version in view.versions
        if version.record["source"] == "generated"
        and all(settings[name] in (None, version.record["run"]["config"][name]) for name in names)
    ]
    return statistics.median(seconds) if seconds else None
