"""Captioning models: an OpenAI-compatible endpoint, or a model of transformers in this process.

Messages have the form of transformers' chat templates: {"role": …, "content": [{"type": "text", "text": …} or
{"type": "image", "image": a PIL image}, …]}.
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from mask2dit.curation.answers import SCHEMA
from mask2dit.curation.config import CaptionConfig
from mask2dit.device import choose_device
from mask2dit.endpoint import Endpoint, RefusedRequestError, Reply, image_part
from mask2dit.optional import import_optional


class Captioner(Protocol):
    def ask(self, messages: list[dict]) -> Reply:
        """The model's answer. Can be called from several threads.

        Raises:
            EndpointError: if this request failed; a subclass if it was refused, or if no request can succeed.
        """
        ...


def check_captioner(config: CaptionConfig) -> None:
    """Raises `ValueError` if there can be no captioner with these settings. Sends no request and reads no weights."""
    if config.backend == "transformers":
        choose_device(config.device)
        _load_processor(config.model)
        return
    import_optional("openai", "curation")
    if config.backend == "openai":
        OpenAICaptioner(config)


class OpenAICaptioner:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, config: CaptionConfig):
        self.config = config
        self.endpoint = Endpoint(
            config.base_url, config.model, config.api_key_env, config.timeout, config.max_retries, "caption."
        )
        self.rate = RateLimit(config.requests_per_minute)

    def ask(self, messages: list[dict]) -> Reply:
        extra = {}
        if self.config.json_schema:
            schema = {"name": "captions", "strict": True, "schema": SCHEMA}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        self.rate.wait()
        try:
            return self.endpoint.ask(
                [_encoded(message) for message in messages], temperature=self.config.temperature, **extra
            )
        except RefusedRequestError as error:
            if error.is_filtered or not self.config.json_schema:
                raise
            hint = "caption.json_schema=false is for endpoints that cannot hold answers to a schema"
            raise RefusedRequestError(f"{error}; {hint}", error.status) from None


class RateLimit:
    """Spaces the requests of all threads evenly."""

    def __init__(self, per_minute: float | None):
        self._pause = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Blocks until the next request may be sent."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._pause
        time.sleep(turn - now)


class TransformersCaptioner:
    """A vision-language model of transformers.

    Raises:
        ValueError: if the folder does not hold one, or the device is not available.
    """

    def __init__(self, config: CaptionConfig):
        from transformers import AutoModelForImageTextToText

        self.processor = _load_processor(config.model)
        with _named_errors(config.model):
            model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
        self.model = model.eval().to(choose_device(config.device))
        self.config = config
        self._lock = threading.Lock()  # one model, one request at a time

    @torch.inference_mode()
    def ask(self, messages: list[dict]) -> Reply:
        with self._lock:
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            # Greedy, so that captions are reproducible.
            output = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        num_input = inputs["input_ids"].shape[1]
        text = self.processor.decode(output[0, num_input:], skip_special_tokens=True)
        return Reply(text, num_input, output.shape[1] - num_input)


def _load_processor(model: str) -> Any:
    """The processor of a folder: what turns messages into the model's inputs."""
    from transformers import AutoProcessor

    if not Path(model).is_dir():
        raise ValueError(f"caption.model={model!r} has to be a folder with a model of transformers")
    with _named_errors(model):
        return AutoProcessor.from_pretrained(model)


@contextmanager
def _named_errors(model: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model!r} does not hold a vision-language model of transformers: {error}") from error


def _encoded(message: dict) -> dict:
    parts = [image_part(part["image"]) if part["type"] == "image" else part for part in message["content"]]
    return {"role": message["role"], "content": parts}
