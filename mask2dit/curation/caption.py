"""Captions by a vision-language model, with one request per group for all its scenes."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mask2dit.curation.answers import PROMPT_VERSION, instructions, parse_answer
from mask2dit.curation.captioners import Captioner
from mask2dit.curation.config import CaptionConfig
from mask2dit.curation.group import Group
from mask2dit.curation.store import Dropped, Entry
from mask2dit.curation.write import Clip
from mask2dit.endpoint import (
    EndpointError,
    InvalidAnswersError,
    RefusedRequestError,
    Reply,
    UnusableEndpointError,
    ask_until_valid,
)
from mask2dit.video.frames import middle_frames

logger = logging.getLogger(__name__)

# For the estimate: characters per token of English, and tokens per caption with its share of the actors.
CHARACTERS_A_TOKEN = 4
TOKENS_A_CAPTION = 160
MAX_FAILURES = 5  # consecutive failed requests after which the run stops
MAX_REFUSALS = 20  # refused requests before the first answer after which the run stops


@dataclass(frozen=True, kw_only=True)
class Captions(Entry):
    """Captions of the group with the same id."""

    clips: list[str]
    actors: dict[str, str]
    """The appearance of each actor, by name."""
    captions: list[str]
    """One caption per clip."""
    model: str
    prompt_version: str
    attempts: int
    input_tokens: int
    output_tokens: int


def caption_settings(config: CaptionConfig) -> dict:
    """The settings that captions depend on. Where the model runs and the rate and number of requests are not among them."""
    names = ["backend", "model", "frames_per_scene", "longest_side", "max_words"]
    names += {"openai": ["temperature"], "transformers": ["dtype", "max_new_tokens"], "stand_in": []}[config.backend]
    return {**{name: getattr(config, name) for name in names}, "prompt": PROMPT_VERSION}


def has_attempts_left(result: Captions | Dropped, config: CaptionConfig) -> bool:
    """True if a group was dropped after fewer attempts than are now allowed. A refused group has none left."""
    return (
        isinstance(result, Dropped)
        and result.rule == "invalid_captions"
        and len(result.details["faults"]) < config.max_attempts
    )


def caption(
    groups: Iterable[Group], clips: Mapping[str, Clip], folder: Path, config: CaptionConfig, captioner: Captioner
) -> Iterator:
    """Captions groups concurrently. Drops groups whose answers stay invalid and groups that the endpoint refuses.

    Other failed requests are not recorded, so that a later run sends them again. A refusal that does not name the content
    as its reason is recorded only once a request has been answered: until then, the settings of all requests may be the
    reason.

    Raises:
        ValueError: if no request can succeed, or the estimate or the cost exceeds `max_cost`.
        OSError: if `MAX_FAILURES` consecutive requests failed, or the first `MAX_REFUSALS` were refused.
    """
    groups = list(groups)
    input_tokens, output_tokens = estimate_tokens(groups, config)
    price = _price(input_tokens, output_tokens, config)
    logger.info(
        "%d requests, about %d tokens in and %d out%s",
        len(groups),
        input_tokens,
        output_tokens,
        "" if price is None else f", which cost about {price:.2f}",
    )
    if config.max_cost is not None and price > config.max_cost:
        raise ValueError(f"the captions would cost about {price:.2f}, more than caption.max_cost={config.max_cost}")

    used_in = used_out = failures = left = 0
    refused: list[tuple[Group, Dropped]] = []
    has_answered = False
    with ThreadPoolExecutor(config.concurrency) as pool:
        futures = {pool.submit(caption_group, group, clips, folder, config, captioner): group for group in groups}
        try:
            for future in as_completed(futures):
                group = futures[future]
                try:
                    result, tokens_in, tokens_out = future.result()
                except UnusableEndpointError:
                    raise
                except EndpointError as error:
                    logger.warning("%s: %s", group.id, error)
                    if isinstance(error, RefusedRequestError):
                        dropped = Dropped(id=group.id, source=group.source, rule="refused", why=str(error))
                        if error.is_filtered or has_answered:
                            yield group, [dropped]
                            continue
                        refused.append((group, dropped))
                    else:
                        failures, left = failures + 1, left + 1
                    if failures >= MAX_FAILURES or len(refused) >= MAX_REFUSALS:
                        raise OSError(
                            f"{max(failures, len(refused))} requests in a row failed, the last because {error}. Run again "
                            "when the endpoint answers: captions so far are kept"
                        ) from None
                    continue
                has_answered = True
                for group_before, dropped in refused:
                    yield group_before, [dropped]
                refused.clear()
                failures = 0
                used_in, used_out = used_in + tokens_in, used_out + tokens_out
                yield group, [result]
                price = _price(used_in, used_out, config)
                if config.max_cost is not None and price > config.max_cost:
                    raise ValueError(
                        f"the captions have cost {price:.2f}, more than caption.max_cost={config.max_cost}: raise it and "
                        "run again, captions so far are kept"
                    )
        finally:
            for future in futures:
                future.cancel()
            price = _price(used_in, used_out, config)
            cost = "" if price is None else f", which cost {price:.2f}"
            logger.info("%d tokens in and %d out%s", used_in, used_out, cost)
    if left := left + len(refused):
        logger.warning("%d requests failed: run again to send them again", left)


def caption_group(
    group: Group, clips: Mapping[str, Clip], folder: Path, config: CaptionConfig, captioner: Captioner
) -> tuple[Captions | Dropped, int, int]:
    """Asks until the answer is valid, at most `max_attempts` times. Each repeated request names the fault.

    Returns:
        The captions or the reason for dropping the group, and the input and output tokens of all attempts.
    """
    content: list[dict] = [{"type": "text", "text": instructions(len(group.clips), config.max_words)}]
    for number, name in enumerate(group.clips, start=1):
        content.append({"type": "text", "text": f"Scene {number}:"})
        reader = clips[name].open(folder)
        for frame in reader.read(middle_frames(0, reader.num_frames, config.frames_per_scene)).numpy():
            image = Image.fromarray(frame)
            image.thumbnail((config.longest_side, config.longest_side))
            content.append({"type": "image", "image": image})
    try:
        answer, replies = ask_until_valid(
            captioner.ask,
            [{"role": "user", "content": content}],
            lambda text: parse_answer(text, len(group.clips), config.max_words),
            config.max_attempts,
        )
    except InvalidAnswersError as error:
        replies = error.replies
        details = {"faults": error.faults, "answer": replies[-1].text}
        dropped = Dropped(id=group.id, source=group.source, rule="invalid_captions", why=str(error), details=details)
        return dropped, *_tokens(replies)
    input_tokens, output_tokens = _tokens(replies)
    captions = Captions(
        id=group.id,
        source=group.source,
        clips=group.clips,
        actors=answer.actors,
        captions=answer.captions,
        model=config.model,
        prompt_version=PROMPT_VERSION,
        attempts=len(replies),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    return captions, input_tokens, output_tokens


def estimate_tokens(groups: Sequence[Group], config: CaptionConfig) -> tuple[int, int]:
    """Input and output tokens if every first answer is valid."""
    num_scenes = sum(len(group.clips) for group in groups)
    text = sum(len(instructions(len(group.clips), config.max_words)) // CHARACTERS_A_TOKEN for group in groups)
    return text + num_scenes * config.frames_per_scene * config.tokens_per_image, num_scenes * TOKENS_A_CAPTION


def _tokens(replies: Sequence[Reply]) -> tuple[int, int]:
    """Input and output tokens."""
    return sum(reply.input_tokens for reply in replies), sum(reply.output_tokens for reply in replies)


def _price(input_tokens: int, output_tokens: int, config: CaptionConfig) -> float | None:
    if config.price_input is None or config.price_output is None:
        return None
    return (input_tokens * config.price_input + output_tokens * config.price_output) / 1e6
