"""Stories written by a language model: `python -m mask2dit.evaluation.write_prompts [CONFIG.yaml] [key=value …]`.

The model is asked for cast and scenes apart; the descriptions are put into the prompts here, so that they are repeated word
for word, and what does not make a valid story is asked for again.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mask2dit import cli
from mask2dit.config import check_at_least

logger = logging.getLogger(__name__)

REQUEST = """Write one story for a video of {num_scenes} scenes.
Its cast are {num_actors} characters, Actor1{others}. Describe each in one phrase without a final period: what they look
like, what they wear, what they hold, such as "an old man with a white beard, wearing a navy wool coat, holding a brass
lantern".
Each scene is one or two sentences in the present tense about what can be seen: who does what, where, in what light. Name
characters only as Actor1, Actor2, …, without describing them again. Scenes take place in different settings. Everyone of
the cast appears in at least two scenes where there are that many.
Do not use any of these titles: {titles}.
Answer with JSON alone: {{"title": "...", "cast": {{"Actor1": "..."}}, "scenes": ["...", "..."]}}"""


@dataclass(kw_only=True)
class WritePromptsConfig:
    """Which model writes how many stories."""

    base_url: str = ""
    """Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    model: str = ""
    """Name of the model at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server needs none."""
    num_stories: int = 50
    """Number of stories in the file at the end."""
    num_scenes: int = 3
    """Scenes per story."""
    max_attempts: int = 3
    """Attempts per story until an answer is valid."""
    temperature: float = 1.0
    """Sampling temperature of the model."""
    output: str = "outputs/evaluation/stories.yaml"
    """File to write; stories that it holds already are kept."""

    def __post_init__(self):
        for name in ("base_url", "model"):
            if not getattr(self, name):
                raise ValueError(f"{name} has to be set, such as base_url=http://localhost:8000/v1 model=my-model")
        for name in ("num_stories", "num_scenes", "max_attempts"):
            check_at_least(name, getattr(self, name), 1)


def write_prompts(config: WritePromptsConfig) -> None:
    """Asks for stories until there are `num_stories`, each kept as it comes.

    Raises:
        ValueError: if the endpoint cannot be used, or a story is not valid after `max_attempts`.
        OSError: if a request fails.
    """
    from mask2dit.endpoint import Endpoint
    from mask2dit.files import check_writable
    from mask2dit.stories import read_stories, write_stories

    output = Path(config.output)
    check_writable(output.parent)
    stories = read_stories(output) if output.is_file() else []
    endpoint = Endpoint(config.base_url, config.model, config.api_key_env)
    while len(stories) < config.num_stories:
        story = _ask_for_story(endpoint, config, stories)
        stories.append(story)
        write_stories(output, stories)
        logger.info("%d of %d: %s", len(stories), config.num_stories, story.title)


def _ask_for_story(endpoint, config: WritePromptsConfig, stories: Sequence):
    """A story that is not among those that are there."""
    from mask2dit.endpoint import InvalidAnswersError, ask_until_valid

    # One to three actors, mostly one.
    num_actors = (1, 2, 1, 2, 1, 3)[len(stories) % 6]
    request = REQUEST.format(
        num_scenes=config.num_scenes,
        num_actors=num_actors,
        others="".join(f", Actor{i}" for i in range(2, num_actors + 1)),
        titles=", ".join(repr(story.title) for story in stories) or "none yet",
    )

    def parse(answer: str):
        story = parse_story(answer, config.num_scenes, num_actors)
        if story.name in {known.name for known in stories}:
            raise ValueError(f"there is a story {story.title!r} already")
        return story

    try:
        return ask_until_valid(
            lambda messages: endpoint.ask(messages, temperature=config.temperature),
            [{"role": "user", "content": request}],
            parse,
            config.max_attempts,
        )[0]
    except InvalidAnswersError as error:
        raise ValueError(f"no valid story after {len(error.faults)} attempts: {error}") from error


def parse_story(answer: str, num_scenes: int, num_actors: int):
    """A story from the model's answer, found by `find_json`, descriptions filled in.

    Raises:
        ValueError: if it is not the JSON that was asked for, or makes no valid story.
    """
    from mask2dit.endpoint import find_json

    return find_json(answer, lambda record: _story_from_answer(record, num_scenes, num_actors))


def _story_from_answer(record: dict, num_scenes: int, num_actors: int):
    from mask2dit.stories import ACTOR, describe_actors, story_from

    cast, scenes = record.get("cast"), record.get("scenes")
    if (
        not isinstance(cast, dict)
        or len(cast) != num_actors
        or not all(isinstance(text, str) for text in cast.values())
    ):
        raise ValueError(f"the cast has to describe {num_actors} characters, but is {cast!r}")
    if not isinstance(scenes, list) or len(scenes) != num_scenes or not all(isinstance(text, str) for text in scenes):
        raise ValueError(f"there have to be {num_scenes} scenes, each a text, but they are {scenes!r}")
    if not all(ACTOR.search(scene) for scene in scenes):
        raise ValueError("every scene has to name an actor")
    return story_from(
        {
            "title": record.get("title"),
            "cast": cast,
            "scenes": [{"prompt": describe_actors(scene, cast)} for scene in scenes],
        }
    )


if __name__ == "__main__":
    sys.exit(cli.run("write", sys.argv[1:]))
