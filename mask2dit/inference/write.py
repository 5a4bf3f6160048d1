"""`mask2dit write`: a story from an idea, a specific prompt from a line, or a set of stories for an evaluation."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mask2dit.config import check_at_least, check_positive

logger = logging.getLogger(__name__)

MOST_WORDS = 150  # in a prompt if no model counts its tokens: they fit into 226 tokens of T5


@dataclass(kw_only=True)
class WriteConfig:
    """Stories written by a language model behind an OpenAI-compatible endpoint."""

    # The story
    idea: str = ""
    """What the story is about. Empty: a set of num_stories stories of the model's choice, for an evaluation."""
    output: str = ""
    """Story file to write, .yaml; empty: story.yaml, or outputs/evaluation/stories.yaml for a set. Stories that are in a set
    are kept; a story is never overwritten."""
    scenes: int = 3
    """Scenes per story."""
    expand: bool = False
    """Expand the idea, a single line, into one specific prompt in the form that the method was trained on: a story of one
    scene."""
    text_model: str | None = None
    """Video model, a folder or a name on the Hugging Face Hub, whose text window prompts have to fit; only its tokenizer is
    read. null: a prompt has at most 150 words, with descriptions."""

    # The endpoint
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    model: str = ""
    """Name of the language model at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server needs none."""
    timeout: float = 120.0
    """Seconds to wait for one answer."""
    max_retries: int = 2
    """Retries after a timeout, a rate limit or a server error."""
    max_attempts: int = 3
    """Answers per story until one is valid; the fault of each is fed back."""
    temperature: float = 1.0
    """Sampling temperature of the language model."""

    # A set of stories
    num_stories: int = 50
    """Number of stories in a set, existing ones included."""

    def __post_init__(self):
        for name in ("base_url", "model"):
            if not getattr(self, name):
                raise ValueError(f"{name} has to be set, such as base_url=http://localhost:8000/v1 model=my-model")
        for name in ("num_stories", "scenes", "max_attempts"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("max_retries", "temperature"):
            check_at_least(name, getattr(self, name), 0)
        check_positive("timeout", self.timeout)
        self.idea = " ".join(self.idea.split())
        if self.expand and not self.idea:
            raise ValueError('expand needs the line to expand, as in mask2dit write "a fox in the snow" expand=true')
        if self.output and not self.output.endswith((".yaml", ".yml")):
            raise ValueError(f"output={self.output!r} has to end in .yaml")


def write_stories(config: WriteConfig) -> None:
    """Asks for a story of the idea and writes it; without an idea, asks for a set and saves each story as it arrives.

    Raises:
        ValueError: if the endpoint cannot be used, or a story is not valid after `max_attempts`.
        FileExistsError: if the story file is there already.
        OSError: if a request fails.
    """
    from mask2dit.endpoint import Endpoint
    from mask2dit.files import check_writable
    from mask2dit.optional import import_optional
    from mask2dit.stories import write_story
    from mask2dit.stories.writer import StoryRequest, ask_for_story

    output = Path(config.output or ("story.yaml" if config.idea else "outputs/evaluation/stories.yaml"))
    if config.idea and output.exists():
        raise FileExistsError(f"{output} is there already: name another output, or remove it")
    check_writable(output.parent)
    import_optional("openai", "evaluation")
    check = _window_check(config.text_model)
    endpoint = Endpoint(
        config.base_url, config.model, config.api_key_env, timeout=config.timeout, max_retries=config.max_retries
    )

    def ask(messages: list[dict]):
        return endpoint.ask(messages, temperature=config.temperature)

    if not config.idea:
        _write_set(config, output, lambda request: ask_for_story(ask, request, check, config.max_attempts))
        return
    request = StoryRequest(num_scenes=1 if config.expand else config.scenes, idea=config.idea, expand=config.expand)
    story = ask_for_story(ask, request, check, config.max_attempts)
    write_story(output, story)
    logger.info("Wrote %s: %s", output, story.title)
    for number, prompt in enumerate(story.prompts, start=1):
        logger.info("Scene %d: %s", number, prompt)


def _write_set(config: WriteConfig, output: Path, ask_for: Callable) -> None:
    """Adds stories to a set until there are `num_stories`."""
    from mask2dit import stories as files
    from mask2dit.stories.writer import StoryRequest

    stories = files.read_stories(output) if output.is_file() else []
    while len(stories) < config.num_stories:
        num_actors = (1, 2, 1, 2, 1, 3)[len(stories) % 6]  # one to three, mostly one
        taken = [story.title for story in stories]
        stories.append(ask_for(StoryRequest(num_scenes=config.scenes, num_actors=num_actors, taken=taken)))
        files.write_stories(output, stories)
        logger.info("%d of %d: %s", len(stories), config.num_stories, stories[-1].title)


def _window_check(text_model: str | None) -> Callable:
    """Returns a check that refuses a story with a prompt over the text window."""
    if text_model is None:

        def describe_cut(prompt: str) -> str | None:
            num_words = len(prompt.split())
            return None if num_words <= MOST_WORDS else f"a prompt of {num_words} words, but {MOST_WORDS} are the most"

    else:
        from mask2dit.inference.check import load_named_model

        describe_cut = load_named_model(text_model).describe_cut

    def check(story) -> None:
        for number, prompt in enumerate(story.prompts, start=1):
            if cut := describe_cut(prompt):
                raise ValueError(f"scene {number} is too long with its descriptions: {cut}; write shorter ones")

    return check
