"""The instructions to captioners, and checks of their answers against the method's format of captions."""

import re
from dataclasses import dataclass

from mask2dit.endpoint import CORRECTION, find_json
from mask2dit.hashing import digest
from mask2dit.stories import ACTOR
from mask2dit.texts import find_encoding_fault

INSTRUCTIONS = """You write the captions of {scenes} for training a video model. You see frames of each scene in order,
under its label.

First find the actors: every person, animal or other character that matters. Name them Actor1, Actor2, … in the order in
which they appear. Describe the appearance of each in one phrase of what can be seen: who it is, age or kind, hair or fur,
clothing with colours, what it holds, such as "a tall young woman with short black hair, wearing a red wool coat". Leave
parentheses and periods out of the phrase. There may be no actors at all.

Then write one caption per scene:
- Say first who is there and where, then what happens, from the beginning of the scene to its end.
- Write specific, complete sentences in the present tense, and begin directly: never "the video shows" or "in this scene".
- At the first mention of an actor in a caption, write the name with the appearance in parentheses, in exactly the words of
  the list: Actor1 (a tall young woman with short black hair, wearing a red wool coat). After that, write Actor1 alone.
- The same actor has the same name in every scene. The same place or object is called the same in every scene.
- Each caption stands by itself: nothing like "again", "still" or "as before".
- Use at most {max_words} words a caption. Write only what can be seen.

Answer with JSON alone, with {count} under "scenes":
{{"actors": [{{"name": "Actor1", "appearance": "..."}}], "scenes": [{{"caption": "..."}}]}}"""

PROMPT_VERSION = f"1-{digest([INSTRUCTIONS, CORRECTION])[:6]}"

SCHEMA = {
    "type": "object",
    "properties": {
        "actors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "appearance": {"type": "string"}},
                "required": ["name", "appearance"],
                "additionalProperties": False,
            },
        },
        "scenes": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"caption": {"type": "string"}},
                "required": ["caption"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["actors", "scenes"],
    "additionalProperties": False,
}

MEDIUM = r"(video|clip|scene|footage|film|frame|image|shot|camera)s?"
SHOWS = "(shows?|depicts?|features?|captures?|presents?|displays?|follows?|opens?|begins?|starts?|is|pans?|zooms?)"
INDIRECT = re.compile(
    rf"(in|throughout) (this|the) {MEDIUM}\b|we (can )?see\b|(this|the|a) {MEDIUM} {SHOWS}\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Answer:
    actors: dict[str, str]
    """The appearance of each actor, by name."""
    captions: list[str]


def instructions(num_scenes: int, max_words: int) -> str:
    """The instructions that precede the scenes."""
    scenes = "one scene" if num_scenes == 1 else f"{num_scenes} consecutive scenes of one film, together"
    count = "one caption" if num_scenes == 1 else f"{num_scenes} captions"
    return INSTRUCTIONS.format(scenes=scenes, max_words=max_words, count=count)


def parse_answer(text: str, num_scenes: int, max_words: int) -> Answer:
    """The actors and captions of an answer, found by `find_json`.

    Raises:
        ValueError: if it is not the requested JSON, or `check_captions` finds a fault.
    """
    return find_json(text, lambda record: _answer_from(record, num_scenes, max_words))


def _answer_from(record: dict, num_scenes: int, max_words: int) -> Answer:
    actors, scenes = record.get("actors"), record.get("scenes")
    if not isinstance(actors, list) or not all(_has_texts(actor, "name", "appearance") for actor in actors):
        raise ValueError('"actors" has to be a list of objects with "name" and "appearance"')
    if not isinstance(scenes, list) or not all(_has_texts(scene, "caption") for scene in scenes):
        raise ValueError('"scenes" has to be a list of objects with "caption"')
    names = [actor["name"].strip() for actor in actors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} is declared twice")
    answer = Answer(
        {name: actor["appearance"].strip() for name, actor in zip(names, actors)},
        [" ".join(scene["caption"].split()) for scene in scenes],
    )
    if len(answer.captions) != num_scenes:
        raise ValueError(f"there are {num_scenes} scenes, but {len(answer.captions)} captions")
    check_captions(answer.actors, answer.captions, max_words)
    return answer


def check_captions(actors: dict[str, str], captions: list[str], max_words: int) -> None:
    """Checks that captions are in the method's format.

    Raises:
        ValueError: for the first fault: an empty, indirect, too long or unfinished caption; an actor that is not declared,
            not described in the declared words at its first mention, described in other words later, or in no caption.
    """
    for name, appearance in actors.items():
        if not ACTOR.fullmatch(name):
            raise ValueError(f"actors are named Actor1, Actor2, …, but one is {name!r}")
        if not appearance or re.search(r"[()]", appearance):
            raise ValueError(f"the appearance of {name} has to be a phrase without parentheses, but is {appearance!r}")
    for number, caption in enumerate(captions, start=1):
        where = f"the caption of scene {number}"
        if not caption:
            raise ValueError(f"{where} is empty")
        if wrong := find_encoding_fault(caption):
            raise ValueError(f"{where} {wrong}")
        if indirect := INDIRECT.match(caption):
            raise ValueError(f"{where} begins with {indirect[0]!r}, but has to begin directly with what is there")
        if caption[-1] not in ".!?\"'”":
            raise ValueError(f"{where} does not end with a complete sentence: …{caption[-40:]!r}")
        if (words := len(caption.split())) > max_words:
            raise ValueError(f"{where} has {words} words, but at most {max_words} fit")
        described = set()
        for mention in ACTOR.finditer(caption):
            name, rest = mention[0], caption[mention.end() :]
            if name not in actors:
                raise ValueError(f"{where} mentions {name}, who is not declared under actors")
            phrase = f" ({actors[name]})"
            if name not in described and not rest.startswith(phrase):
                raise ValueError(f"{where}: the first mention of {name} has to be {name + phrase!r}, word for word")
            if rest.startswith(" (") and not rest.startswith(phrase):
                raise ValueError(f"{where} describes {name} in other words than {actors[name]!r}")
            described.add(name)
    mentioned = ACTOR.findall(" ".join(captions))
    if absent := [name for name in actors if name not in mentioned]:
        raise ValueError(f"{absent[0]} is declared, but is in no caption")


def _has_texts(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)
