"""Choice of the device that a configuration names."""

import os

import torch


def choose_device(name: str) -> torch.device:
    """Returns the named device; "auto" is a GPU if there is one. Raises `ValueError` if the device is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device has to be auto, cpu, cuda or cuda:1, but is {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch finds no GPU: use device=cpu, or install torch for CUDA")
    return device


def name_cpu_to_deepspeed() -> None:
    """Tells DeepSpeed that there is no GPU, where there is none.

    DeepSpeed looks for a device when it is imported, as accelerate does whenever a model is saved, and warns on the standard
    output if it finds none.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
