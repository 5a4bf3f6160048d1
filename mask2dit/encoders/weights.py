"""Safe loading of weights that the user provides."""

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def load_weights(path: str | os.PathLike, *keys: str) -> dict[str, torch.Tensor]:
    """Reads the tensors of a `.safetensors` file or a torch checkpoint.

    Args:
        path: the file. A checkpoint is read with `weights_only=True`, so that it cannot run code.
        *keys: keys under which a checkpoint may hold its weights; the first one present is used. Without any, the checkpoint
            itself is the weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights {str(path)!r}: docs/evaluation.md says where to get them")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"the weights {str(path)!r} cannot be read: fetch them again") from error
    found = [checkpoint[key] for key in keys if isinstance(checkpoint, dict) and key in checkpoint]
    weights = found[0] if found else checkpoint
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{str(path)!r} does not hold weights by name, but {type(weights).__name__}")
    return weights
