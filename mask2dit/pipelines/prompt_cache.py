"""Embeddings of prompts, computed once and kept in a folder, so that the text encoder need not be loaded for every story.

Each text has a file of its own, named by the text and by everything that its embedding depends on. A folder may serve
several models and processes.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from mask2dit.files import atomic_path, open_tensors
from mask2dit.hashing import digest, fingerprint

REMEDY = "remove it, and it is computed again"
KEY = "prompt_embeds"


def caption_key(caption: str) -> str:
    """Returns the key of a text in caches of embeddings."""
    return digest(["caption", caption])


def text_settings(model: str | os.PathLike, dtype: str, text_length: int, variant: str | None = None) -> dict:
    """Returns all settings that the embedding of a text depends on.

    Args:
        model: the model's folder, whose text encoder and tokenizer are fingerprinted.
        dtype: the text encoder's dtype.
        text_length: tokens of the text window.
        variant: the variant of the text encoder's weights.
    """
    return {
        **{f"{part} weights": fingerprint(Path(model) / part) for part in ("text_encoder", "tokenizer")},
        "text_length": text_length,
        "dtype": dtype,
        **({"variant": variant} if variant else {}),
    }


class PromptCache:
    """Reads and writes embeddings.

    Args:
        folder: the folder, created on first use.
        settings: what embeddings depend on, see `text_settings`. Those made with other settings are not found.
        shape: (L, D) of an embedding.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict, shape: tuple[int, int]):
        self.folder = Path(folder)
        self.settings = digest(settings)
        self.shape = shape

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Returns the texts that are not in the folder, without duplicates."""
        return [text for text in dict.fromkeys(texts) if not self._path(text).is_file()]

    def load(self, text: str) -> torch.Tensor | None:
        """Loads the embedding of a text, (L, D); None if it is not in the folder.

        Raises:
            ValueError: if its file is damaged, with the file.
        """
        path = self._path(text)
        if not path.is_file():
            return None
        with open_tensors(path, REMEDY) as file:
            embedding = file.get_tensor(KEY)
        if tuple(embedding.shape) != self.shape or not embedding.isfinite().all():
            raise ValueError(f"{path} is damaged: {REMEDY}")
        return embedding

    def save(self, text: str, embedding: torch.Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(text)) as temporary:
            save_file({KEY: embedding.contiguous().cpu()}, temporary)

    def _path(self, text: str) -> Path:
        return self.folder / f"text-{caption_key(text)}-{self.settings}.safetensors"
