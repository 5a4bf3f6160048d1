"""LoRA files of CogVideoX in the forms of common trainers, converted to diffusers' form.

| written by           | a key                                                             |
|----------------------|-------------------------------------------------------------------|
| diffusers            | `transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`       |
| PEFT                 | `base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight`  |
| ComfyUI              | `diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight`   |
| kohya, VideoX-Fun    | `lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight`     |

An `alpha` next to a module's weights scales that module by alpha / rank.
"""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from torch import nn

from mask2dit.models.loading import weight_shapes

logger = logging.getLogger(__name__)

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
DOTTED_PREFIX = re.compile(r"(?:(?:base_model|model|diffusion_model|module|transformer)\.)*")
FLAT_PREFIX = re.compile(r"lora_(?:unet|transformer)_+")
PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)(?:\.[^.]+)?\.(?P<kind>weight|bias)|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\..+)?)"
)
SIDES = {"down": "A", "up": "B", "A": "A", "B": "B"}
MODELS = {1920: " (CogVideoX-2B)", 3072: " (CogVideoX-5B)"}  # by width

Key = tuple[str, str]  # (module of the transformer, weight), such as "lora_A.weight" or "alpha"


def lora_file(path: str | os.PathLike, weight_name: str | None = None, subfolder: str | None = None) -> Path:
    """Returns the file that holds a LoRA: `path` itself or, in a folder, the file that `choose_lora` selects.

    Raises:
        FileNotFoundError, ValueError: as `choose_lora`.
    """
    path = Path(path) / (subfolder or "")
    if not path.exists():
        raise FileNotFoundError(f"there is no LoRA {str(path)!r}: name a .safetensors file or the folder of one")
    if path.is_file():
        return path
    available = {file.name for file in path.iterdir() if file.is_file()}
    if weight_name is not None and (path / weight_name).is_file():  # it may be in a subfolder
        available.add(weight_name)
    return path / choose_lora(available, weight_name, str(path))


def choose_lora(available: Collection[str], weight_name: str | None, where: str) -> str:
    """Chooses the file of a LoRA among the files of a folder or a repository: `weight_name`, the file with diffusers' or
    PEFT's name, or the only weights file.

    Args:
        available: names of the files.
        weight_name: the file to choose. None: see above.
        where: the folder or repository, for messages.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several and none is selected.
    """
    for name in FILE_NAMES if weight_name is None else (weight_name,):
        if name in available:
            return name
    files = [sorted(name for name in available if name.endswith(suffix)) for suffix in (".safetensors", ".bin")]
    files = files[0] or files[1]
    if not files or weight_name is not None:
        found = f" (it holds {', '.join(files)})" if files else ""
        raise FileNotFoundError(
            f"there is no LoRA in {where!r}: expected {weight_name or 'a .safetensors file'}{found}"
        )
    if len(files) > 1:
        raise ValueError(f"{where!r} holds {', '.join(files)}: name one of these files by weight_name")
    return files[0]


def check_lora(path: str | os.PathLike, transformer: nn.Module) -> None:
    """Compares a LoRA's file with a transformer, on any device including "meta", without loading the file.

    Raises:
        FileNotFoundError, ValueError: as `load_lora`.
    """
    file = lora_file(path)
    _parse(weight_shapes(file), transformer, str(file))


def target_layers(model: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    """The linear layers that `target_modules` name, as PEFT does it: by their whole name or the end of it."""
    endings = tuple(f".{target}" for target in targets)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(endings)
    ]


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises `ValueError` if a name of `target_modules` matches no linear layer, or there are none."""
    unknown = [target for target in targets if not target_layers(model, [target])]
    if targets and not unknown:
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The end of a name that says what the layer does: to_q, but to_out.0
    known = sorted({re.search(r"[^.]+(\.\d+)*$", name)[0] for name in linear})
    fault = f"{', '.join(unknown)} matches none" if unknown else "is empty"
    raise ValueError(f"lora.target_modules has to name linear layers, but {fault}: use some of {', '.join(known)}")


def load_lora(
    source: str | os.PathLike | Mapping[str, torch.Tensor], transformer: nn.Module, **kwargs
) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Reads a LoRA in any of the forms above.

    Args:
        source: a file, a folder, or the weights by key.
        transformer: the model to load it into.
        **kwargs: as for `lora_state_dict` of diffusers (`weight_name`, `subfolder`, …).

    Returns:
        The weights in diffusers' form, with alphas multiplied in, and the configuration in the file, if any.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is corrupt, its keys cannot be converted, or its weights do not fit the transformer.
    """
    name, file = str(source), None
    if isinstance(source, Mapping):
        name = "given as weights"
        _parse(_shapes(source), transformer, name)
    else:
        file = lora_file(source, kwargs.pop("weight_name", None), kwargs.pop("subfolder", None))
        source = name = str(file)
        _parse(weight_shapes(file), transformer, name)
    # Also checked before, since diffusers drops keys that it cannot convert.
    weights, metadata = CogVideoXLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True, **kwargs)
    keys = _parse(_shapes(weights), transformer, name)
    parts = {keys[key]: weight for key, weight in weights.items()}
    if metadata is None and file is not None:
        metadata = _peft_config(file)
    converted = {}
    for (module, part), weight in parts.items():
        alpha = parts.get((module, "alpha"))
        if part == "lora_B.weight" and alpha is not None:
            weight = (weight.float() * (float(alpha) / weight.shape[1])).to(weight.dtype)
        if part != "alpha":
            converted[f"transformer.{module}.{part}"] = weight
    return converted, metadata


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(torch.as_tensor(weight).shape) for key, weight in weights.items()}  # an alpha may be a number


def _peft_config(file: Path) -> dict | None:
    """Reads the configuration that PEFT writes next to its file, which holds the alphas, under diffusers' names."""
    if not (file.name.startswith("adapter_model.") and (file.parent / PEFT_CONFIG).is_file()):
        return None
    config = LoraConfig.from_pretrained(file.parent).to_dict()
    return {f"transformer.{name}": value for name, value in config.items()}


def _parse(shapes: Mapping[str, tuple[int, ...]], transformer: nn.Module, source: str) -> dict[str, Key]:
    """Maps each key of a LoRA to module and weight. Raises `ValueError` unless all of them fit the transformer."""
    transformer = getattr(transformer, "_orig_mod", transformer)  # compiled by torch.compile
    modules = dict(transformer.named_modules())
    flat_names = {name.replace(".", "_"): name for name in modules}
    # Forms of older diffusers versions; the converter accepts any values.
    renamed = {key: next(iter(convert_unet_state_dict_to_peft({key: None}))) for key in shapes}
    keys: dict[str, Key] = {}
    foreign = []
    for key in shapes:
        match = PART.fullmatch(renamed[key])
        if match is None:
            foreign.append(key)
            continue
        if match["alpha"]:
            part = "alpha"
        elif match["magnitude"]:
            part = "lora_magnitude_vector"
        else:
            part = f"lora_{SIDES[match['side']]}.{match['kind']}"
        keys[key] = (_module_name(match["module"], flat_names), part)
    if not shapes:
        raise ValueError(f"the LoRA {source!r} holds no weights")
    if foreign:
        raise ValueError(
            f"the LoRA {source!r} has {len(foreign)} weights that cannot be converted to diffusers' form, for instance "
            f"{foreign[0]!r}"
        )
    parts = {keys[key]: (key, shape) for key, shape in shapes.items()}
    twice = [key for key in shapes if parts[keys[key]][0] != key]
    if twice:
        raise ValueError(
            f"the LoRA {source!r} holds {twice[0]!r} again as {parts[keys[twice[0]]][0]!r}: keep one of them"
        )
    _check(parts, modules, transformer.config, source)
    return keys


def _module_name(name: str, flat_names: dict[str, str]) -> str:
    """Returns the dotted name of a module, in this transformer or in one with more blocks."""
    flat = FLAT_PREFIX.match(name)
    if not flat:
        return name[DOTTED_PREFIX.match(name).end() :]
    name = name[flat.end() :]
    block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", name)
    if block and (in_block := flat_names.get(f"transformer_blocks_0_{block[2]}")):
        return in_block.replace(".0.", f".{block[1]}.", 1)
    return flat_names.get(name, name)


def _check(parts: dict[Key, tuple[str, tuple[int, ...]]], modules: dict[str, nn.Module], config, source: str) -> None:
    """Raises `ValueError` for a LoRA of another depth or width, of unknown modules, or of other shapes."""
    layers, width = _depth_and_width({part: shape for part, (_, shape) in parts.items()})
    has_layers, has_width = config.num_layers, config.num_attention_heads * config.attention_head_dim
    if layers > has_layers or width not in (None, has_width):
        of_width = "" if width is None else f" of width {width}{MODELS.get(width, '')}"
        raise ValueError(
            f"the LoRA {source!r} has weights for {layers} layers{of_width}, but this transformer has {has_layers} layers "
            f"of width {has_width}{MODELS.get(has_width, '')}: use a LoRA that was trained for it"
        )
    for (module, _), (key, _) in parts.items():
        if module not in modules or _features(modules[module]) is None:
            raise ValueError(f"the LoRA {source!r} has weights for {module}, not for this transformer (key {key!r})")
        if not {(module, "lora_A.weight"), (module, "lora_B.weight")} <= parts.keys():
            raise ValueError(f"the LoRA {source!r} has only one half of the weights for {module} (key {key!r})")
        down, up = (parts[module, f"lora_{side}.weight"][1] for side in "AB")
        inputs, outputs = _features(modules[module])
        if len(down) < 2 or len(up) < 2 or (down[1], up[0], down[0]) != (inputs, outputs, up[1]):
            raise ValueError(
                f"the LoRA {source!r} has weights of the shapes {down} and {up} for {module}, which needs (rank, {inputs}) "
                f"and ({outputs}, rank) (key {key!r})"
            )


def _depth_and_width(shapes: Mapping[Key, tuple[int, ...]]) -> tuple[int, int | None]:
    """Returns the number of blocks that a LoRA covers, and their width; None if no weight determines it."""
    layers, width = 0, None
    for (module, part), shape in shapes.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)", module)
        if not block:
            continue
        layers = max(layers, int(block[1]) + 1)
        if part == "lora_A.weight" and re.search(r"to_[qkv]$|ff\.net\.0\.proj$", block[2]) and len(shape) == 2:
            width = shape[1]
        elif part == "lora_B.weight" and re.search(r"to_out\.0$|ff\.net\.2$", block[2]):
            width = shape[0]
    return layers, width


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output width of a layer that LoRA can change; None for others."""
    module = getattr(module, "base_layer", module)  # the layer already has a LoRA
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    return None
