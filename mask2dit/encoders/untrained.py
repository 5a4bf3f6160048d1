"""A tiny ViCLIP with random weights, so that the whole evaluation runs without a download. Its scores mean nothing."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from mask2dit.encoders.clip_tokenizer import clip_tokenizer
from mask2dit.encoders.viclip import ViCLIP
from mask2dit.files import atomic_path, write_text

UNTRAINED = "untrained"
CONFIG = {
    "input_resolution": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "embed_dim": 16,
    "vocab_size": 514,
    "text_width": 32,
    "text_heads": 2,
    "text_layers": 2,
}


def build_untrained_viclip(path: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the weights and, next to them, the vocabulary of a tokenizer of single letters. Existing weights are kept.

    Raises:
        ValueError: if the file is not named "untrained….safetensors", so that it is never mistaken for real weights.
    """
    path = Path(path)
    if not path.name.startswith(UNTRAINED) or path.suffix != ".safetensors":
        raise ValueError(f"{path.name!r} has to be named {UNTRAINED}….safetensors, since its weights are random")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = ViCLIP(**CONFIG).state_dict()
    tokenizer = clip_tokenizer([])
    write_text(path.parent / "vocab.json", json.dumps(tokenizer.get_vocab()))
    write_text(path.parent / "merges.txt", "#version: 0.2\n")
    with atomic_path(path) as temporary:
        save_file(weights, temporary, {"config": json.dumps(CONFIG)})
    return path
