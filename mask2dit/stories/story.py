"""A story and its grammar.

The method's prompts write a character as "Actor1 (a tall woman, wearing a red coat, holding a lantern)" and repeat the
description, word for word, in every scene that shows it. A story holds each description once, in its cast.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mask2dit.texts import find_encoding_fault

ACTOR = re.compile(r"\bActor[1-9][0-9]*\b")  # the only form of actors' names: Actor1, Actor2, …, Actor10, …
STORY_KEYS = ("title", "style", "negative", "seed", "cast", "scenes")
SCENE_KEYS = ("prompt", "seconds", "frames", "seed", "video")
ALIASES = ("duration",)  # of seconds, in stories of evaluations
SENTENCE_ENDS = ".!?…。！？।؟"
MAX_SEED = 2**63
MAX_SECONDS, MAX_FRAMES = 3600, 100_000  # of one scene; far more than any model carries
MAX_NAME = 200  # bytes of a story's name as a file name, which leaves room for suffixes

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value of a record, such as ("scenes", 2, "prompt")."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene as a person writes it."""

    prompt: str
    """What the scene shows. Actors are named; their descriptions come from the cast."""
    seconds: float | None = None
    """Length in seconds; None: unspecified."""
    frames: int | None = None
    """Length in frames, in place of seconds; None: unspecified."""
    seed: int | None = None
    """Seed of the scene's initial noise; None: the noise follows from the story's seed."""
    video: str | None = None
    """File of a given scene, relative to the story file's folder; None: the scene is generated."""

    def length(self, fps: float) -> float | None:
        """Wanted number of frames; None: unspecified."""
        return self.frames if self.seconds is None else self.seconds * fps


@dataclass(frozen=True, kw_only=True)
class Story:
    """A title, the descriptions of its cast by name ("Actor1", …), and scenes.

    Raises:
        ValueError: for a faulty story; the message names the story and the scene.
    """

    title: str
    scenes: tuple[Scene, ...]
    cast: Mapping[str, str] = field(default_factory=dict)
    style: str = ""
    """Text appended to every prompt."""
    negative: str = ""
    """Negative prompt of all scenes; empty: unspecified."""
    seed: int | None = None
    """Seed of the noise; None: unspecified."""

    def __post_init__(self):
        for place, message in find_faults(self.record()):
            raise ValueError(f"story {self.title!r}, {describe_place(place)}: {message}")

    @property
    def name(self) -> str:
        """Title as a file name."""
        return file_name(self.title)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that the model gets: with descriptions at first mentions, and the style."""
        return tuple(complete_prompt(scene.prompt, self.cast, self.style) for scene in self.scenes)

    @property
    def actors(self) -> list[frozenset[str]]:
        """Names of the actors in each scene."""
        return [frozenset(ACTOR.findall(scene.prompt)) for scene in self.scenes]

    def record(self) -> dict:
        """The story as its file holds it, without what is unspecified. `story_from` reads it."""
        scenes = []
        for scene in self.scenes:
            record = {key: getattr(scene, key) for key in SCENE_KEYS if getattr(scene, key) is not None}
            scenes.append(record["prompt"] if record.keys() == {"prompt"} else record)
        record = {"title": self.title, "style": self.style, "negative": self.negative, "seed": self.seed}
        record = {key: value for key, value in record.items() if value not in ("", None)}
        return {**record, **({"cast": dict(self.cast)} if self.cast else {}), "scenes": scenes}


def story_from(record: object) -> Story:
    """Builds a story from the record in a file.

    Raises:
        ValueError: as `Story`, and for unknown keys and wrong types.
    """
    for place, message in find_faults(record):
        title = record.get("title") if isinstance(record, dict) else None
        raise ValueError(f"story {title!r}, {describe_place(place)}: {message}")
    assert isinstance(record, dict)
    scenes = [{"prompt": scene} if isinstance(scene, str) else dict(scene) for scene in record["scenes"]]
    for scene in scenes:
        if "duration" in scene:
            scene["seconds"] = scene.pop("duration")
    given = {key: record[key] for key in STORY_KEYS if record.get(key) is not None}
    return Story(**{**given, "scenes": tuple(Scene(**scene) for scene in scenes)})


def complete_prompt(prompt: str, cast: Mapping[str, str], style: str = "") -> str:
    """Inserts descriptions at first mentions, unless they are there, and appends the style."""
    prompt = describe_actors(prompt, cast)
    if not style.strip():
        return prompt
    prompt = prompt.rstrip()
    return f"{prompt}{' ' if prompt.endswith(tuple(SENTENCE_ENDS)) else ', '}{style.strip()}"


def describe_actors(prompt: str, cast: Mapping[str, str]) -> str:
    """Inserts each actor's description after the first mention, as in the method's prompts."""

    def described(match: re.Match) -> str:
        actor = match[0]
        if actor not in cast or actor in seen:
            return actor
        seen.add(actor)
        description = f" ({cast[actor].strip()})"
        return actor if prompt.startswith(description, match.end()) else actor + description

    seen: set[str] = set()
    return ACTOR.sub(described, prompt)


def file_name(title: str) -> str:
    """Returns a title as a file name: letters and digits in lower case, with hyphens between words."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", title).lower()).strip("-")


def describe_place(place: Place) -> str:
    """Names the part of a story where a value is, such as "scene 3"."""
    match place:
        case ("scenes", int(index), *_):
            return f"scene {index + 1}"
        case (str(key), *_) if key in STORY_KEYS:
            return key
    return "the story"


def find_faults(record: object) -> Iterator[tuple[Place, str]]:
    """Finds every fault of a story's record: where it is, and what it is."""
    if not isinstance(record, dict):
        yield (), f"a story has a title, a cast and scenes, but this is {_shown(record)}"
        return
    yield from _unknown_keys((), record, STORY_KEYS)
    yield from _title_faults(record.get("title"))
    for key in ("style", "negative"):
        if record.get(key) is not None:
            yield from _text_faults((key,), record[key], required=False)
    yield from _seed_faults(("seed",), record.get("seed"))
    cast = record.get("cast")
    yield from _cast_faults(cast)
    scenes = record.get("scenes")
    if not isinstance(scenes, Sequence) or isinstance(scenes, str) or not scenes:
        shown = "" if scenes is None or scenes == [] else f", but is {_shown(scenes)}"
        yield ("scenes",) if "scenes" in record else (), f"the story has no scenes: scenes is a list of prompts{shown}"
        return
    known = cast if isinstance(cast, dict) else {}
    for index, scene in enumerate(scenes):
        yield from _scene_faults(index, scene, known)
    prompts = [scene.get("prompt") if isinstance(scene, dict) else scene for scene in scenes]
    named = {actor for prompt in prompts if isinstance(prompt, str) for actor in ACTOR.findall(prompt)}
    for actor in known:
        if isinstance(actor, str) and ACTOR.fullmatch(actor) and actor not in named:
            yield ("cast", actor), f"{actor} of the cast is in no scene: name it in a prompt, or leave it out"


def _title_faults(title: object) -> Iterator[tuple[Place, str]]:
    if title is None or title == "":
        yield ("title",) if title == "" else (), "the story needs a title"
        return
    faults = list(_text_faults(("title",), title))
    yield from faults
    if not faults:
        name = file_name(str(title))
        if not name:
            yield ("title",), f"the title needs letters or digits, but is {_shown(title)}"
        elif len(name.encode()) > MAX_NAME:
            yield ("title",), f"the title has {len(str(title))} characters, too many for the name of a file"


def _cast_faults(cast: object) -> Iterator[tuple[Place, str]]:
    if cast is None:
        return
    if not isinstance(cast, Mapping):
        yield ("cast",), f"the cast gives each actor a description, as in Actor1: a red fox, but is {_shown(cast)}"
        return
    for actor, description in cast.items():
        if not isinstance(actor, str) or not ACTOR.fullmatch(actor):
            yield (
                ("cast", str(actor)),
                f"the cast has {_shown(actor)}, but actors are named Actor1, Actor2, … in cast and prompts",
            )
        if description is None or (isinstance(description, str) and not description.strip()):
            yield ("cast", str(actor)), f"{_shown(actor)} has no description"
        else:
            yield from _text_faults(("cast", str(actor)), description)


def _scene_faults(index: int, scene: object, cast: Mapping[str, str]) -> Iterator[tuple[Place, str]]:
    here: Place = ("scenes", index)
    if isinstance(scene, str):
        scene, prompt_at = {"prompt": scene}, here
    elif isinstance(scene, dict):
        prompt_at = (*here, "prompt")
    else:
        yield here, f"a scene is a prompt, or has a prompt, but is {_shown(scene)}"
        return
    if len(scene) == 1 and isinstance(key := next(iter(scene)), str) and (" " in key or ACTOR.search(key)):
        yield here, f"the prompt {_shown(f'{key}: {scene[key]}')} has a colon: put quotes around it"
        return
    yield from _unknown_keys(here, scene, SCENE_KEYS + ALIASES)
    prompt = scene.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        yield prompt_at if "prompt" in scene else here, "the prompt is missing"
    else:
        faults = list(_text_faults(prompt_at, prompt))
        yield from faults or _actor_faults(prompt_at, str(prompt), cast)
    lengths = [key for key in ("seconds", "duration", "frames") if scene.get(key) is not None]
    if len(lengths) > 1:
        yield (*here, lengths[1]), f"{' and '.join(lengths)} both give the length: keep one of them"
    for key in lengths:
        yield from _length_faults((*here, key), key, scene[key])
    yield from _seed_faults((*here, "seed"), scene.get("seed"))
    if (video := scene.get("video")) is not None:
        yield from _text_faults((*here, "video"), video)


def _actor_faults(place: Place, prompt: str, cast: Mapping[str, str]) -> Iterator[tuple[Place, str]]:
    """Faults of a prompt's actors. Without a cast, prompts may have any form."""
    if not cast:
        return
    seen: set[str] = set()
    for match in ACTOR.finditer(prompt):
        actor, is_first = match[0], match[0] not in seen
        seen.add(actor)
        if actor not in cast:
            if is_first:
                yield place, f"{actor} is not in the cast, which has {', '.join(map(str, cast))}"
            continue
        if not isinstance(cast[actor], str):
            continue
        description = f" ({cast[actor].strip()})"
        is_described = prompt.startswith(description, match.end())
        if is_first and not is_described and (found := re.match(r"\s*\([^()]*\)?", prompt[match.end() :])):
            yield (
                place,
                f"the first mention of {actor} is followed by {found[0].strip()!r}, but its description comes from the cast: "
                f"leave it out, or write {description.strip()!r}, word for word",
            )
        if not is_first and is_described:
            yield place, f"{actor} is described at a later mention: the description belongs to the first one"


def _length_faults(place: Place, key: str, value: object) -> Iterator[tuple[Place, str]]:
    if key == "frames":
        if type(value) is not int or not 1 <= value <= MAX_FRAMES:
            yield place, f"frames has to be a whole number from 1 to {MAX_FRAMES}, but is {_shown(value)}"
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SECONDS:
        yield place, f"{key} has to be a positive number of seconds, at most {MAX_SECONDS}, but is {_shown(value)}"


def _seed_faults(place: Place, seed: object) -> Iterator[tuple[Place, str]]:
    if seed is not None and (type(seed) is not int or not 0 <= seed < MAX_SEED):
        yield place, f"seed has to be a whole number from 0 to {MAX_SEED - 1}, but is {_shown(seed)}"


def _text_faults(place: Place, text: object, required: bool = True) -> Iterator[tuple[Place, str]]:
    if not isinstance(text, str):
        yield place, f"{place[-1]} has to be a text, but is {_shown(text)}"
    elif wrong := find_encoding_fault(text):
        yield place, f"the text {wrong}"
    elif required and not text.strip():
        yield place, f"{place[-1]} is empty"


def _unknown_keys(place: Place, record: Mapping, known: Sequence[str]) -> Iterator[tuple[Place, str]]:
    for key in record:
        if key not in known:
            close = difflib.get_close_matches(str(key).lower(), known, n=1)
            listed = ", ".join(name for name in known if name not in ALIASES)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {listed}"
            yield (*place, str(key)), f"there is no key {_shown(key)}; {hint}"


def _shown(value: object) -> str:
    """A value as messages quote it: in one line, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…"
