"""CLIP's byte-pair encoding in ViCLIP's window of 32 tokens.

`clip_merges.txt.gz` holds the 48,894 merges of OpenAI CLIP's vocabulary of 49,408 entries (github.com/openai/CLIP), under the
licence in `clip_merges.LICENSE`.
"""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip_merges.txt.gz"


class ViCLIPTokenizer:
    """Turns texts into windows of token ids.

    Args:
        tokenizer: CLIP's tokenizer, from `load_clip_tokenizer`.
        context_length: L, the tokens per window, including start and end.
    """

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int = 32):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def is_cut(self, text: str) -> bool:
        """True if the text is longer than one window."""
        return len(self._ids(text)) > self.context_length - 2

    def window(self, text: str) -> torch.Tensor:
        """The beginning of the text, (L,). Text beyond the window is cut off, as published."""
        return self._framed(self._ids(text)[: self.context_length - 2])

    def chunks(self, text: str) -> torch.Tensor:
        """The whole text in as few consecutive windows as possible, (C, L). Words are kept whole where they fit."""
        ids, room = self._ids(text), self.context_length - 2
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        windows, start = [], 0
        while start < len(ids) or not windows:
            stop = min(start + room, len(ids))
            whole_words = [end for end in range(start + 1, stop + 1) if tokens[end - 1].endswith("</w>")]
            if stop < len(ids) and whole_words:
                stop = whole_words[-1]
            windows.append(self._framed(ids[start:stop]))
            start = stop
        return torch.stack(windows)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _framed(self, ids: Sequence[int]) -> torch.Tensor:
        window = torch.zeros(self.context_length, dtype=torch.long)  # padded with 0, as ViCLIP was trained
        window[: len(ids) + 2] = torch.tensor([self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id])
        return window


def load_clip_tokenizer(folder: str | os.PathLike) -> CLIPTokenizer:
    """The tokenizer of `vocab.json` and `merges.txt` if the folder has both, else CLIP's."""
    folder = Path(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    return clip_tokenizer([tuple(merge.split(" ")) for merge in merges])


def clip_tokenizer(merges: Sequence[tuple[str, str]]) -> CLIPTokenizer:
    """A tokenizer with CLIP's order of entries: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=list(merges))
