"""Quantized weights: the transformer and the text encoder in 8 or 4 bits, converted while they are loaded.

torchao stores int8 and fp8 with one scale per output channel and computes in the model's dtype, on CPU and GPU. bitsandbytes
needs a CUDA GPU. GGUF is not among them: diffusers reads GGUF by `from_single_file`, which does not know CogVideoX.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from mask2dit.config import QUANTIZATIONS, check_choice


@dataclass(frozen=True)
class Quantization:
    """A form of quantized weights."""

    library: str
    bytes_per_weight: float
    block_size: int | None
    """Weights that share a scale of 4 bytes; None: those of one output channel."""
    modes: tuple[str, ...]
    """Memory modes that it works with."""


FORMS = {
    "int8": Quantization("torchao", 1, None, ("full", "model_offload")),
    "fp8": Quantization("torchao", 1, None, ("full", "model_offload")),
    "bnb_int8": Quantization("bitsandbytes", 1, None, ("full", "model_offload")),
    "nf4": Quantization("bitsandbytes", 0.5, 64, ("full", "model_offload")),
}
assert tuple(FORMS) == QUANTIZATIONS


def check_quantization(name: str, device: torch.device, memory: str = "full") -> None:
    """Raises `ValueError` if a form is unknown, or cannot be used here, with the reason and the remedy."""
    check_choice("quantization", name, QUANTIZATIONS)
    form = FORMS[name]
    if form.library == "bitsandbytes" and device.type != "cuda":
        raise ValueError(
            f"quantization={name} needs a CUDA GPU, since bitsandbytes computes there alone: use int8 or fp8"
        )
    if find_spec(form.library) is None:
        raise ValueError(f"quantization={name} needs {form.library}: pip install {form.library}")
    if memory not in form.modes:
        raise ValueError(
            f"quantization={name} cannot be used with memory={memory}, which moves or converts single weights: use "
            f"memory={' or memory='.join(form.modes)}"
        )


def quantization_config(name: str, dtype: torch.dtype, library: str) -> Any:
    """Returns the configuration that a library's `from_pretrained` takes.

    Args:
        name: a key of `FORMS`.
        dtype: the dtype to compute in.
        library: "diffusers" or "transformers".
    """
    classes = {"diffusers": diffusers, "transformers": transformers}[library]
    if FORMS[name].library == "torchao":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        return classes.TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig())
    if name == "nf4":
        return classes.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return classes.BitsAndBytesConfig(load_in_8bit=True)


def quantized_bytes(module: nn.Module, name: str | None) -> int:
    """Predicts the bytes of a module's weights in a form, of which only those of linear layers are quantized."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
    if name is None:
        return total
    form = FORMS[name]
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight
            scales = weight.shape[0] if form.block_size is None else -(-weight.numel() // form.block_size)
            total += int(weight.numel() * form.bytes_per_weight) + 4 * scales - weight.numel() * weight.element_size()
    return total


def check_unquantized(config: dict, what: str) -> None:
    """Raises `ValueError` for the configuration of a model that is quantized already."""
    if config.get("quantization_config"):
        raise ValueError(f"{what} is quantized already: leave quantization out, and it loads as it was saved")
