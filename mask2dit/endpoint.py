"""Language models behind OpenAI-compatible endpoints, for whatever asks one: captions, the judge, stories."""

import base64
import io
import os
from dataclasses import dataclass

from PIL import Image


class EndpointError(OSError):
    """A request failed, after the retries. The message never holds the key.

    Attributes:
        status: the HTTP status; None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    text: str
    input_tokens: int
    output_tokens: int


class Endpoint:
    """A model at an endpoint.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: its name there.
        api_key_env: the environment variable that holds the key; a server of one's own needs none.
        timeout: seconds for one answer.
        max_retries: of a request that met a rate limit, a server error or the timeout, ever later.

    Raises:
        ModuleNotFoundError: without the package openai, which is an optional extra.
    """

    def __init__(
        self, base_url: str | None, model: str, api_key_env: str, timeout: float = 600.0, max_retries: int = 3
    ):
        import openai

        self.base_url, self.model = base_url, model
        self._key = os.environ.get(api_key_env)
        # The package asks for a key even where the server does not.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=max_retries
        )
        self._failures = openai.OpenAIError

    def ask(self, messages: list[dict], **options) -> Reply:
        """The model's answer. Several threads may ask at once.

        Args:
            messages: as the API of chat completions has them.
            options: further parameters of a completion, such as `temperature`.

        Raises:
            EndpointError: if the request fails.
        """
        try:
            response = self._client.chat.completions.create(model=self.model, messages=messages, **options)
        except self._failures as error:
            message = " ".join(str(error).split())
            if self._key:
                message = message.replace(self._key, "…")
            # Without the cause, whose message may hold the key.
            raise EndpointError(message, getattr(error, "status_code", None)) from None
        usage = response.usage
        text = (response.choices[0].message.content if response.choices else None) or ""
        return Reply(text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)


def image_part(image: Image.Image) -> dict:
    """A picture as a part of a message's content."""
    with io.BytesIO() as file:
        image.save(file, format="JPEG", quality=90)
        data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
