"""CLIP's byte-pair encoding in ViCLIP's window of 32 tokens.

The vocabulary of 49,408 entries is OpenAI CLIP's (MIT licence). It is not part of this repository: it is read from the
folder of the weights, or from the package open_clip_torch, which carries the original file.
"""

import gzip
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

ORIGINAL = "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 48894  # of the original file's; the rest was never part of CLIP's vocabulary


class ViCLIPTokenizer:
    """Texts to windows of token ids.

    Args:
        tokenizer: CLIP's, as `load_clip_tokenizer` reads it.
        context_length: L, tokens of a window with its start and end.
    """

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int = 32):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def is_cut(self, text: str) -> bool:
        """Whether the text is longer than one window."""
        return len(self._ids(text)) > self.context_length - 2

    def window(self, text: str) -> torch.Tensor:
        """The beginning of the text, (L,): as published, what exceeds the window is cut off."""
        return self._framed(self._ids(text)[: self.context_length - 2])

    def chunks(self, text: str) -> torch.Tensor:
        """The whole text in as few windows as follow one another, (C, L); words are kept whole where they fit."""
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
    """CLIP's tokenizer from the original vocabulary file, or from `vocab.json` and `merges.txt`, in a folder; without
    either, from the package open_clip_torch.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the vocabulary is damaged.
    """
    folder = Path(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    package = importlib.util.find_spec("open_clip")  # found without being imported: only its file is needed
    places = [folder, *(package.submodule_search_locations if package else [])]
    files = [Path(place) / ORIGINAL for place in places if (Path(place) / ORIGINAL).is_file()]
    if not files:
        raise FileNotFoundError(
            f"there is no vocabulary of CLIP in {str(folder)!r}: put {ORIGINAL} from github.com/openai/CLIP there, or "
            "pip install --no-deps open_clip_torch, which carries it"
        )
    try:
        lines = gzip.decompress(files[0].read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"the vocabulary {str(files[0])!r} is damaged ({error}): fetch it again") from error
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    if len(merges) != NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"the vocabulary {str(files[0])!r} is not CLIP's: fetch it again")
    return clip_tokenizer(merges)


def clip_tokenizer(merges: Sequence[tuple[str, str]]) -> CLIPTokenizer:
    """A tokenizer with CLIP's order of entries: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=list(merges))
