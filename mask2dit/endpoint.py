"""Client for language models behind OpenAI-compatible endpoints: for captions, the judge and stories."""

import base64
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar
from urllib.parse import urlsplit

from PIL import Image

logger = logging.getLogger(__name__)

T = TypeVar("T")
CORRECTION = "That cannot be used: {fault}. Answer with the whole corrected JSON alone."

MAX_MESSAGE = 300  # characters quoted from an endpoint in an error; some answer with a page
MAX_PAUSE = 8.0  # seconds before a retry after an answer with an error and status 200
# Wording of endpoints that refuse a request for its content alone.
FILTERED = re.compile(
    r"content.?(filter|polic|management|inspection)|data.?inspection|responsible.?ai|moderat|flagged|due to safety",
    re.I,
)
REASONING_END = re.compile(r"</(?:think|thinking|reasoning)>", re.I)
JSON_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings


class EndpointError(OSError):
    """A request failed after the retries; a later one may succeed. The message names the endpoint and never holds the key.

    Attributes:
        status: the HTTP status, or the one stated in the body of an answer with status 200; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class RefusedRequestError(EndpointError):
    """The endpoint refuses this request, however often it is sent.

    Attributes:
        is_filtered: True if the endpoint names the content as the reason. Otherwise, it may be the request's options.
    """

    def __init__(self, message: str, status: int | None = None, is_filtered: bool = False):
        super().__init__(message, status)
        self.is_filtered = is_filtered


class UnusableEndpointError(EndpointError, ValueError):
    """No request to this endpoint can succeed with this address, model and key."""


class InvalidAnswersError(ValueError):
    """No answer was valid. The message is the last fault.

    Attributes:
        faults: the fault of each answer.
        replies: the replies in the same order.
    """

    def __init__(self, faults: list[str], replies: list["Reply"]):
        super().__init__(faults[-1])
        self.faults, self.replies = faults, replies


@dataclass(frozen=True)
class Reply:
    text: str
    input_tokens: int
    output_tokens: int


class Endpoint:
    """A model at an endpoint.

    Args:
        base_url: the address, such as "http://localhost:8000/v1"; None: OpenAI's own.
        model: the model's name at the endpoint.
        api_key_env: the environment variable that holds the key; a local server needs none.
        timeout: seconds to wait for one answer.
        max_retries: retries after a rate limit, a server error or a timeout, with growing delays.
        section: the configuration section of these settings, such as "judge.", for messages.

    Raises:
        ModuleNotFoundError: if openai, an optional extra, is not installed.
        ValueError: if the address or the key cannot be sent.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        api_key_env: str,
        timeout: float = 600.0,
        max_retries: int = 3,
        section: str = "",
    ):
        import openai

        if base_url is not None and not _is_http(base_url):
            raise ValueError(f"{section}base_url must begin with http:// or https:// and a host, but is {base_url!r}")
        self._key = os.environ.get(api_key_env, "").strip()
        if not self._key.isascii():
            raise ValueError(f"the key in {api_key_env} holds characters that are not ASCII: copy it again")
        # The package requires a key even if the server does not.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=max_retries
        )
        self._failures = openai.OpenAIError
        self.model, self.max_retries = model, max_retries
        self.url = base_url or str(self._client.base_url)
        self._remedy = f"check {section}base_url, {section}model and the key in {api_key_env}"

    def ask(self, messages: list[dict], **options) -> Reply:
        """Sends a request and returns the model's answer. Safe to call from several threads.

        Args:
            messages: messages in the form of the chat completions API.
            options: further completion parameters, such as `temperature`.

        Raises:
            EndpointError: if the request fails; one of its subclasses if sending it again cannot help.
        """
        for retry in count():
            try:
                # Raw, since the package returns pages and lists as if they were completions.
                response = self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **options
                )
            except self._failures as error:
                reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
                # Drop the cause: its message may hold the key.
                raise self._error(reason, getattr(error, "status_code", None), getattr(error, "body", "")) from None
            try:
                return self._read(response.http_response)
            except EndpointError as error:
                # The package decides on retries by the status alone, which was 200.
                if isinstance(error, RefusedRequestError | UnusableEndpointError) or retry == self.max_retries:
                    raise
            time.sleep(min(0.5 * 2**retry, MAX_PAUSE))

    def _read(self, response) -> Reply:
        """Extracts the answer from a response with a good status."""
        body = response.text.strip()
        try:
            completion = json.loads(body)
        except (ValueError, RecursionError):
            if (body and "json" not in response.headers.get("content-type", "json")) or body.startswith("<"):
                raise self._unusable(f"it answers with {body[:60]!r}") from None
            raise self._error(f"its answer is {'cut short' if body else 'empty'}") from None
        if not isinstance(completion, dict) or not completion.keys() & {"choices", "error"}:
            raise self._unusable(f"it answers with {body[:60]!r}")
        choices = completion.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        if error := completion.get("error") or choice.get("error"):
            error = error if isinstance(error, dict) else {"message": error}
            code = str(error.get("code") or error.get("status") or "")
            message = error.get("message") or json.dumps(error)
            raise self._error(
                f"{message} (in an answer with status 200)", int(code) if code.isdecimal() else None, error
            )
        if choice.get("finish_reason") == "content_filter":
            raise self._error("the answer was withheld by its content filter", 400, "content_filter")
        if not choice:
            raise self._error("its answer holds no choices")
        message = choice.get("message")
        usage = completion.get("usage")
        counts = [
            number if isinstance(usage, dict) and isinstance(number := usage.get(name), int) else 0
            for name in ("prompt_tokens", "completion_tokens")
        ]
        return Reply(_text_of(message) if isinstance(message, dict) else "", *counts)

    def _error(self, reason: str, status: int | None = None, details: object = "") -> EndpointError:
        """Chooses the error class for a failure by its status and its message."""
        reason = " ".join(reason.split())
        message = f"the endpoint {self.url} failed: {reason[:MAX_MESSAGE]}{'…' * (len(reason) > MAX_MESSAGE)}"
        if self._key:
            message = message.replace(self._key, "…")
        is_filtered = bool(FILTERED.search(f"{reason} {details}"))
        if status in (400, 413, 422, 451) or (status == 403 and is_filtered):
            return RefusedRequestError(message, status, is_filtered)
        if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            return UnusableEndpointError(f"{message}; {self._remedy}", status)
        return EndpointError(message, status)

    def _unusable(self, why: str) -> UnusableEndpointError:
        return UnusableEndpointError(
            f"the endpoint {self.url} does not speak the API of chat completions: {why}; {self._remedy}"
        )


def ask_until_valid(
    ask: Callable[[list[dict]], Reply], messages: list[dict], parse: Callable[[str], T], max_attempts: int
) -> tuple[T, list[Reply]]:
    """Asks until an answer is valid, reporting the faults of earlier answers to the model.

    Args:
        ask: takes messages and returns the reply.
        messages: the messages of the request.
        parse: takes the text of an answer, and raises `ValueError` with its fault.
        max_attempts: maximum number of answers.

    Returns:
        The result of `parse` for the valid answer, and all replies.

    Raises:
        InvalidAnswersError: if none is valid.
    """
    replies: list[Reply] = []
    faults: list[str] = []
    is_text = isinstance(messages[0]["content"], str)  # otherwise a list of parts
    for attempt in range(1, max_attempts + 1):
        replies.append(ask(messages))
        try:
            return parse(replies[-1].text), replies
        except ValueError as fault:
            faults.append(str(fault))
            logger.warning("Answer %d of at most %d cannot be used: %s", attempt, max_attempts, fault)
        # Endpoints refuse an empty text, which a declining model may return.
        turns = [("assistant", replies[-1].text or "(no answer)"), ("user", CORRECTION.format(fault=faults[-1]))]
        messages = messages + [
            {"role": role, "content": text if is_text else [{"type": "text", "text": text}]} for role, text in turns
        ]
    raise InvalidAnswersError(faults, replies)


def find_json(text: str, validate: Callable[[dict], T]) -> T:
    """Finds the JSON object in an answer: in a code block, between sentences or after reasoning.

    Every object in the text is a candidate, or only those after the reasoning if there are any. The last valid one is taken.

    Args:
        text: the text of the answer.
        validate: takes an object and returns the result, or raises `ValueError` with its fault.

    Raises:
        ValueError: if no object is valid, with the fault of the longest.
    """
    after = REASONING_END.split(text)[-1]
    if "{" in after:
        text = after
    found: list[T] = []
    fault, longest = "the answer holds no JSON object", 0
    start = text.find("{")
    while start >= 0:
        stop = start + 1
        try:
            candidate, end = JSON_DECODER.raw_decode(text, start)
            reason = ""
            try:
                json.dumps(candidate, ensure_ascii=False).encode()  # files are UTF-8, which has no lone surrogates
                found.append(validate(candidate))
                stop = end
            except UnicodeEncodeError:
                reason = "the answer holds half of a surrogate pair"
            except ValueError as error:
                reason = str(error)
        except RecursionError:
            end, reason = start + 1, "the answer is not valid JSON (it is nested too deeply)"
        except ValueError as error:
            end, reason = getattr(error, "pos", start) + 1, f"the answer is not valid JSON ({error})"
        if reason and end - start > longest:
            fault, longest = reason, end - start
        start = text.find("{", stop)
    if not found:
        raise ValueError(fault)
    return found[-1]


def image_part(image: Image.Image) -> dict:
    """Encodes a picture as a part of a message's content."""
    with io.BytesIO() as file:
        image.save(file, format="JPEG", quality=90)
        data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def _text_of(message: dict) -> str:
    """Returns a message's text, from a text or a list of parts, without lone surrogates, which UTF-8 cannot encode."""
    content = message.get("content") or message.get("refusal") or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).encode(errors="replace").decode()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False
