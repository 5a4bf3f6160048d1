"""Stories written by a language model, asked until they are valid.

The model returns cast and scenes separately. `Story` inserts the descriptions into prompts and repeats them word for word.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mask2dit.endpoint import InvalidAnswersError, Reply, ask_until_valid, find_json
from mask2dit.stories.story import ACTOR, Story, describe_place, file_name, find_faults, story_from

REQUEST = """{task}
{cast} Describe each in one phrase without a final period: what they look like, what they wear, what they hold, such as "an
old man with a white beard, wearing a navy wool coat, holding a brass lantern".
Each scene is one or two sentences in the present tense about what can be seen: who does what, where, in what light. Name
characters only as Actor1, Actor2, …, without describing them again.{more}
Write in English. Answer with JSON alone: {{"title": "...", "cast": {{"Actor1": "..."}}, "scenes": ["...", "..."]}}"""
NEW = "Write one story for a video of {num_scenes} scenes."
OF_IDEA = "Write one story for a video of {num_scenes} scenes about this idea: {idea}"
OF_LINE = """Expand this line into one specific prompt for a video of one scene: {idea}
Keep everything that the line says. Add what it leaves open: looks, dress, what is held, place, light, movement."""
MOST_ACTORS = 3
MOST_FAULTS = 5  # that the model is told at once
LEAST_WORDS = 20  # fewer do not tell a language
# Common words of English. Hardly a text of twenty words is without them, and other languages that use Latin letters are.
ENGLISH = frozenset("a and at by from her his in into its of on over the their through to under while with".split())  # noqa: SIM905


@dataclass(frozen=True, kw_only=True)
class StoryRequest:
    """What a language model is asked to write."""

    num_scenes: int
    num_actors: int | None = None
    """Number of characters; None: one to three, as the model chooses."""
    idea: str = ""
    """What the story is about; empty: the model chooses."""
    expand: bool = False
    """True: the idea is a line that becomes one specific prompt, possibly without characters."""
    taken: Collection[str] = ()
    """Titles of stories that are there already."""

    def text(self) -> str:
        """The request as the model gets it."""
        task = OF_LINE if self.expand else OF_IDEA if self.idea else NEW
        cast = f"Its cast are one to {MOST_ACTORS} characters, Actor1, Actor2, …"
        if self.num_actors is not None:
            others = "".join(f", Actor{i}" for i in range(2, self.num_actors + 1))
            cast = f"Its cast are {self.num_actors} characters, Actor1{others}."
        more = "" if self.expand else " Everyone of the cast appears in at least two scenes where there are that many."
        if self.expand:
            cast = "Its cast are the characters of the line, Actor1, Actor2, …, or nobody: {}."
        if not self.idea:
            more += " Scenes take place in different settings."
            more += f"\nDo not use any of these titles: {', '.join(map(repr, self.taken)) or 'none yet'}."
        return REQUEST.format(task=task.format(num_scenes=self.num_scenes, idea=self.idea), cast=cast, more=more)


def ask_for_story(
    ask: Callable[[list[dict]], Reply],
    request: StoryRequest,
    check: Callable[[Story], None],
    max_attempts: int,
) -> Story:
    """Asks a language model for a story until one is valid, with the faults of earlier answers.

    Args:
        ask: takes messages and returns the reply.
        request: what to write.
        check: raises `ValueError` for a story that cannot be used, for instance with a prompt over the text window.
        max_attempts: maximum number of answers.

    Raises:
        ValueError: if no answer is valid; the message is the last fault.
    """
    messages = [{"role": "user", "content": request.text()}]
    try:
        return ask_until_valid(ask, messages, lambda answer: parse_story(answer, request, check), max_attempts)[0]
    except InvalidAnswersError as error:
        last = " ".join(error.replies[-1].text.split())
        quoted = f"; the last answer begins {last[:80]!r}" if "{" not in last and last else ""
        raise ValueError(f"no valid story after {len(error.faults)} attempts: {error}{quoted}") from error


def parse_story(answer: str, request: StoryRequest, check: Callable[[Story], None]) -> Story:
    """Reads the story in an answer, which may stand between sentences or after reasoning.

    Raises:
        ValueError: if it is not the requested JSON, or not a valid story.
    """

    def validate(record: dict) -> Story:
        story = _story_from_answer(record, request)
        check(story)
        return story

    return find_json(answer, validate)


def _story_from_answer(record: dict, request: StoryRequest) -> Story:
    cast, scenes = record.get("cast"), record.get("scenes")
    least, most = (request.num_actors or 1, request.num_actors or MOST_ACTORS)
    if request.expand:
        least = 0
    if not isinstance(cast, dict) or not least <= len(cast) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"the cast has to describe {wanted} characters, but is {cast!r}")
    if (
        not isinstance(scenes, list)
        or len(scenes) != request.num_scenes
        or not all(isinstance(s, str) for s in scenes)
    ):
        raise ValueError(f"there have to be {request.num_scenes} scenes, each a text, but they are {scenes!r}")
    if cast and not all(ACTOR.search(scene) for scene in scenes):
        raise ValueError("every scene has to name an actor")
    record = {"title": record.get("title"), "cast": cast, "scenes": scenes}
    if faults := [f"{describe_place(place)}: {message}" for place, message in find_faults(record)]:
        raise ValueError("; ".join(faults[:MOST_FAULTS]))
    if not _is_english(" ".join([*scenes, *cast.values()])):
        raise ValueError("the story has to be in English, the language of the captions that the model was trained on")
    story = story_from(record)
    if story.name in {file_name(title) for title in request.taken}:
        raise ValueError(f"there is a story {story.title!r} already")
    return story


def _is_english(text: str) -> bool:
    """False for a text that is clearly in another language. Short texts are taken for English."""
    letters = [character for character in ACTOR.sub("", text) if character.isalpha()]
    if sum(not character.isascii() for character in letters) > len(letters) / 10:
        return False
    words = re.findall(r"[^\W\d_]+", ACTOR.sub("", text).lower())
    return len(words) < LEAST_WORDS or sum(word in ENGLISH for word in words) >= len(words) / 10
