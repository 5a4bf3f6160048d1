"""Captions by a vision-language model, with one request per group for all its scenes."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

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
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_CAPTION = 160
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

    Once a run has to stop, requests that are running are waited for and their captions kept, since they are paid for.

    Raises:
        ValueError: if no request can succeed, or the estimate or the cost exceeds `max_cost`.
        OSError: if `MAX_FAILURES` consecutive requests failed, or the first `MAX_REFUSALS` were refused.
    """
    groups = list(groups)
    _check_estimate(groups, config)
    failures = left = 0
    refused: list[tuple[Group, Dropped]] = []
    has_answered = False
    reason: Exception | None = None  # to stop
    used = _Used(captioner)
    pool = ThreadPoolExecutor(config.concurrency)
    try:
        futures = {pool.submit(caption_group, group, clips, folder, config, used): group for group in groups}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            group = futures[future]
            try:
                result = future.result()
            except UnusableEndpointError as error:
                reason = reason or error
            except EndpointError as error:
                logger.warning("%s: %s", group.id, error)
                if isinstance(error, RefusedRequestError):
                    dropped = Dropped(id=group.id, source=group.source, rule="refused", why=str(error))
                    if error.is_filtered or has_answered:
                        yield group, [dropped]
                    else:
                        refused.append((group, dropped))
                else:
                    failures, left = failures + 1, left + 1
                if failures >= MAX_FAILURES or len(refused) >= MAX_REFUSALS:
                    reason = reason or OSError(
                        f"{max(failures, len(refused))} requests in a row failed, the last because {error}. Run again "
                        "when the endpoint answers: captions so far are kept"
                    )
            except Exception as error:
                reason = reason or error
            else:
                has_answered, failures = True, 0
                for group_before, dropped in refused:
                    yield group_before, [dropped]
                refused.clear()
                yield group, [result]
            if reason or _is_too_much(used.price(config), config):
                for queued in futures:
                    queued.cancel()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for requests that are running
        price = used.price(config)
        cost = "" if price is None else f", which cost {price:.2f}"
        logger.info("%d tokens in and %d out%s", used.input_tokens, used.output_tokens, cost)
    if reason:
        raise reason
    if _is_too_much(price, config):
        raise ValueError(
            f"the captions have cost {price:.2f}, more than caption.max_cost={config.max_cost}: raise it and run again, "
            "captions so far are kept"
        )
    if left := left + len(refused):
        logger.warning("%d requests failed: run again to send them again", left)


def _check_estimate(groups: list[Group], config: CaptionConfig) -> None:
    """Logs the estimated tokens and cost. Raises `ValueError` if the cost exceeds `max_cost`."""
    expected = estimate_tokens(groups, config)
    price = _price(*expected, config)
    logger.info(
        "%d requests, about %d tokens in and %d out%s",
        len(groups),
        *expected,
        "" if price is None else f", which cost about {price:.2f}",
    )
    if _is_too_much(price, config):
        raise ValueError(f"the captions would cost about {price:.2f}, more than caption.max_cost={config.max_cost}")


class _Used:
    """A captioner that counts the tokens of all its answers, also of those that cannot be used.

    Args:
        captioner: the captioner that it asks.
    """

    def __init__(self, captioner: Captioner):
        self.input_tokens = self.output_tokens = 0
        self._captioner = captioner
        self._lock = Lock()

    def ask(self, messages: list[dict]) -> Reply:
        reply = self._captioner.ask(messages)
        with self._lock:
            self.input_tokens += reply.input_tokens
            self.output_tokens += reply.output_tokens
        return reply

    def price(self, config: CaptionConfig) -> float | None:
        return _price(self.input_tokens, self.output_tokens, config)


def caption_group(
    group: Group, clips: Mapping[str, Clip], folder: Path, config: CaptionConfig, captioner: Captioner
) -> Captions | Dropped:
    """Asks until the answer is valid, at most `max_attempts` times. Each repeated request names the fault."""
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
        details = {"faults": error.faults, "answer": error.replies[-1].text}
        return Dropped(id=group.id, source=group.source, rule="invalid_captions", why=str(error), details=details)
    return Captions(
        id=group.id,
        source=group.source,
        clips=group.clips,
        actors=answer.actors,
        captions=answer.captions,
        model=config.model,
        prompt_version=PROMPT_VERSION,
        attempts=len(replies),
        input_tokens=sum(reply.input_tokens for reply in replies),
        output_tokens=sum(reply.output_tokens for reply in replies),
    )


def estimate_tokens(groups: Sequence[Group], config: CaptionConfig) -> tuple[int, int]:
    """Input and output tokens if every first answer is valid."""
    num_scenes = sum(len(group.clips) for group in groups)
    text = sum(len(instructions(len(group.clips), config.max_words)) // CHARACTERS_PER_TOKEN for group in groups)
    return text + num_scenes * config.frames_per_scene * config.tokens_per_image, num_scenes * TOKENS_PER_CAPTION


def _price(input_tokens: int, output_tokens: int, config: CaptionConfig) -> float | None:
    if config.price_input is None or config.price_output is None:
        return None
    return (input_tokens * config.price_input + output_tokens * config.price_output) / 1e6


def _is_too_much(price: float | None, config: CaptionConfig) -> bool:
    return price is not None and config.max_cost is not None and price > config.max_cost
