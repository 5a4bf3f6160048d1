"""Stories (a title, a cast and one prompt per scene): reading, writing, and the names of actors in prompts.

The method's prompts write a character as "Actor1 (a tall woman, wearing a red coat, holding a lantern)" and repeat the
description, word for word, in every scene that shows it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mask2dit.files import write_text
from mask2dit.texts import find_encoding_fault, parse_json, read_text

ACTOR = re.compile(r"\bActor[1-9][0-9]*\b")  # the only form of actors' names: Actor1, Actor2, …, Actor10, …
STORY_KEYS = {"title", "cast", "scenes"}
SCENE_KEYS = {"prompt", "duration"}


@dataclass(frozen=True, kw_only=True)
class Story:
    """A title, the descriptions of its cast by name ("Actor1", …), and one prompt per scene.

    Raises:
        ValueError: if something is missing or does not fit; the message names the story and the scene.
    """

    title: str
    cast: Mapping[str, str]
    prompts: tuple[str, ...]
    durations: tuple[float | None, ...]
    """Seconds of each scene; None: unspecified."""

    def __post_init__(self):
        if not isinstance(self.title, str) or not re.search(r"[A-Za-z0-9]", self.title):
            raise ValueError(f"a story needs a title with letters or digits, but has {self.title!r}")
        if wrong := find_encoding_fault(self.title):
            raise ValueError(f"story {self.title!r}: the title {wrong}")
        if not self.prompts:
            raise ValueError(f"story {self.title!r} has no scenes")
        for actor, description in self.cast.items():
            if not ACTOR.fullmatch(str(actor)):
                raise ValueError(f"story {self.title!r}: the cast has {actor!r}, but actors are Actor1, Actor2, …")
            if not isinstance(description, str) or not description.strip():
                raise ValueError(f"story {self.title!r}: {actor} has no description")
            if wrong := find_encoding_fault(description):
                raise ValueError(f"story {self.title!r}: the description of {actor} {wrong}")
        for number, (prompt, duration) in enumerate(zip(self.prompts, self.durations), start=1):
            where = f"story {self.title!r}, scene {number}"
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"{where}: the prompt is missing")
            if wrong := find_encoding_fault(prompt):
                raise ValueError(f"{where}: the prompt {wrong}")
            if duration is not None and not (isinstance(duration, int | float) and 0 < duration < float("inf")):
                raise ValueError(f"{where}: the duration has to be a positive number of seconds, but is {duration!r}")
            self._check_actors(where, prompt)
        if absent := self.cast.keys() - set().union(*self.actors):
            raise ValueError(f"story {self.title!r}: {', '.join(sorted(absent))} of the cast is in no scene")

    @property
    def name(self) -> str:
        """Title as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def actors(self) -> list[frozenset[str]]:
        """Names of the actors in each scene."""
        return [frozenset(ACTOR.findall(prompt)) for prompt in self.prompts]

    def _check_actors(self, where: str, prompt: str) -> None:
        if not self.cast:
            return  # the prompts do not use the method's form
        for actor in dict.fromkeys(ACTOR.findall(prompt)):
            if actor not in self.cast:
                raise ValueError(f"{where}: {actor} is not in the cast ({', '.join(self.cast)})")
            described = f"{actor} ({self.cast[actor]})"
            if not prompt[re.search(rf"\b{actor}\b", prompt).start() :].startswith(described):
                raise ValueError(f"{where}: the first mention of {actor} has to be {described!r}, word for word")


def read_stories(path: str | os.PathLike) -> list[Story]:
    """Reads the stories of a YAML or JSON file with the key `stories`: each has `title`, `cast` and `scenes`, and each scene
    has a `prompt` and optionally a `duration` in seconds. Also reads a fine-tuning manifest, such as `sft.json`: a story's
    captions are its prompts, and its prefix is its title.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        ValueError: if it is not such a file, a story is faulty, or two stories have the same name.
    """
    path = Path(path)
    text = read_text(path, "file of stories")
    is_json = path.suffix.lower() == ".json"
    if not is_json and (wrong := find_encoding_fault(text)):
        raise ValueError(f"{path}: it {wrong}")
    try:
        # A YAML parser misreads some JSON: "\ud83c\udf82" as two halves of a character.
        content = parse_json(text) if is_json else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: from a date such as 2024-13-01
        raise ValueError(
            f"{path}: this is not {'JSON' if is_json else 'YAML'}: {' '.join(str(error).split())}"
        ) from error
    is_manifest = isinstance(content, list)
    records = content if is_manifest else content.get("stories") if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise ValueError(
            f"{path}: it has to hold a list of stories under the key 'stories', or be a manifest of videos"
        )
    stories = []
    for number, record in enumerate(records, start=1):
        try:
            stories.append(_story_from_manifest(record) if is_manifest else story_from(record))
        except ValueError as error:
            raise ValueError(f"{path}, story {number}: {error}") from error
    names = [story.name for story in stories]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: several stories are named {sorted(twice)[0]!r}: give each its own title")
    return stories


def write_stories(path: str | os.PathLike, stories: Sequence[Story], header: str = "") -> None:
    """Writes stories in the YAML form that `read_stories` reads, below a header of comment lines."""
    records = [
        {
            "title": story.title,
            "cast": dict(story.cast),
            "scenes": [
                {"prompt": prompt, **({"duration": duration} if duration else {})}
                for prompt, duration in zip(story.prompts, story.durations)
            ],
        }
        for story in stories
    ]
    text = yaml.safe_dump({"stories": records}, sort_keys=False, allow_unicode=True, width=118)
    write_text(path, header + text)


def story_from(record: object) -> Story:
    """Builds a story from its record in a YAML file.

    Raises:
        ValueError: as `Story`, and for unknown keys.
    """
    if not isinstance(record, dict) or not isinstance(record.get("scenes"), list):
        raise ValueError("a story has a title, a cast and a list of scenes")
    _check_keys("a story", record, STORY_KEYS)
    scenes = [{"prompt": scene} if isinstance(scene, str) else scene for scene in record["scenes"]]
    for scene in scenes:
        if not isinstance(scene, dict):
            raise ValueError(f"a scene has a prompt, but is {scene!r}")
        _check_keys("a scene", scene, SCENE_KEYS)
    cast = record.get("cast") or {}
    if not isinstance(cast, dict):
        raise ValueError(f"the cast gives each actor a description, but is {cast!r}")
    return Story(
        title=record.get("title"),
        cast=cast,
        prompts=tuple(scene.get("prompt") for scene in scenes),
        durations=tuple(scene.get("duration") for scene in scenes),
    )


def _story_from_manifest(record: object) -> Story:
    try:
        return story_from({"title": record["prefix"], "scenes": [scene["caption"] for scene in record["values"]]})
    except (TypeError, KeyError) as error:
        raise ValueError("a video of a manifest has a prefix, and values with a caption each") from error


def describe_actors(prompt: str, cast: Mapping[str, str]) -> str:
    """Inserts each actor's description after the first mention, as in the method's prompts."""
    for actor, description in cast.items():
        prompt = re.sub(
            rf"\b{re.escape(actor)}\b", lambda match, text=description: f"{match[0]} ({text})", prompt, count=1
        )
    return prompt


def _check_keys(what: str, record: dict, known: set[str]) -> None:
    if unknown := record.keys() - known:
        raise ValueError(f"{what} has no key {sorted(map(str, unknown))[0]!r}; known are {', '.join(sorted(known))}")
