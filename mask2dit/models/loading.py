"""Reading model folders: trained with this package, released by the authors, or plain CogVideoX.

A folder's weights are checked against the model from the files' headers, before anything is loaded: nothing missing,
nothing unknown, no other shape. Loading itself is diffusers': each weight goes straight to its dtype and device.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from safetensors import SafetensorError, safe_open
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import is_protobuf_available

CONFIG_NAME = "config.json"
DIFFUSERS_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
TRANSFORMERS_NAMES = ("model.safetensors", "pytorch_model.bin")


def model_folder(folder: str | os.PathLike, subfolder: str | None, default: str = "") -> Path:
    """The folder that holds a model's `config.json`: `folder/subfolder` or, without a subfolder, `folder` itself or its
    part named `default`.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}: name a local folder with a model's weights")
    if subfolder is None:
        subfolder = "" if (folder / CONFIG_NAME).is_file() else default
    if not (folder / subfolder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"there is no {CONFIG_NAME} in {str(folder / subfolder)!r}: a part of the model is missing"
        )
    return folder / subfolder


def check_links(folder: Path, parts: Iterable[str]) -> None:
    """Raises `FileNotFoundError` if a part of a model, or a file in it, is a link to something that is not there."""
    for part in parts:
        for path in (folder / part, *(folder / part).glob("*")):
            if path.is_symlink() and not path.exists():
                raise FileNotFoundError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there: put it back, or make the folder "
                    "whole where it is (export with copy_frozen=true, or copy it with cp -rL)"
                )


def weight_files(folder: Path, variant: str | None = None, names: tuple[str, str] = DIFFUSERS_NAMES) -> list[Path]:
    """The weights of one model: the files that are checked, and the only ones that are loaded.

    `.safetensors` go before `.bin`; of either, the files of an index before a file of the library's own name, and that
    before any others. A folder that holds one variant alone needs no `variant`.

    Args:
        variant: what sets other weights apart in file names, "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
        names: the library's names of a single `.safetensors` and a single `.bin` file.

    Raises:
        FileNotFoundError: if there are none, none of this variant, or a file that the index names is missing.
        ValueError: if the index is corrupt, or nothing tells which of several variants is meant.
    """
    for name in names:
        index = folder / _add_variant(f"{name}.index.json", variant)
        if index.is_file():
            return _indexed_files(index)
        file = folder / _add_variant(name, variant)
        if file.is_file():
            return [file]
    by_variant = _files_by_variant(folder, names)
    if variant in by_variant:
        return by_variant[variant]
    others = ", ".join(sorted(by_variant.keys() - {None}))
    if variant is not None:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no weights of the variant {variant!r} (its variants: {others or 'none'})"
        )
    if len(by_variant) == 1:
        return weight_files(folder, others, names)
    if by_variant:
        raise ValueError(f"{str(folder)!r} holds weights of the variants {others}: pass one of them as variant")
    raise FileNotFoundError(f"{str(folder)!r} holds no weights: expected .safetensors or .bin files in it")


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a folder holds weights of a variant."""
    return any(variant in _files_by_variant(folder, names) for names in (DIFFUSERS_NAMES, TRANSFORMERS_NAMES))


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a file, without loading them. Pickled code is never run.

    Raises:
        ValueError: if the file is corrupt.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        weights = torch.load(file, map_location="meta", weights_only=True)
        return {name: tuple(weight.shape) for name, weight in weights.items()}
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{str(file)!r} is not a readable weights file ({reason}): fetch it again") from error


def empty_model(cls: type[ModelMixin], folder: Path) -> torch.nn.Module:
    """A diffusers model as its `config.json` describes it, on the "meta" device: all of it but the weights."""
    config = cls.load_config(folder)
    known = cls._get_init_keys(cls)
    with init_empty_weights():
        return cls(**{key: value for key, value in config.items() if key in known})


def check_weights(model: ModelMixin, folder: Path, files: list[Path]) -> None:
    """Compares the weights in files with those that a model (on any device, "meta" too) has.

    Raises:
        ValueError: naming the weights that are missing, unknown or of another shape.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = _shapes(files)
    if "quantization_config" in type(model).load_config(folder):
        found = _as_before_quantization(expected, found)
    _compare(expected, found, folder, type(model).__name__)


def load_model(
    cls: type, from_pretrained: Callable, folder: Path, variant: str | None = None, **kwargs
) -> torch.nn.Module:
    """Loads a diffusers model after checking its files.

    Args:
        cls: the model's class.
        from_pretrained: diffusers' `from_pretrained` of that class.
        folder: the folder with `config.json` and weights.
        variant: which weights, see `weight_files`.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if a file is corrupt, its weights do not fit the model, or `torch_dtype` is not a dtype.
    """
    check_dtype(kwargs.get("torch_dtype"))
    files = weight_files(folder, variant)
    check_weights(empty_model(cls, folder), folder, files)
    with _plain_layout(folder, files, DIFFUSERS_NAMES) as layout:
        # Said outright, since diffusers looks for the other kind first and reports an error on the way.
        model = from_pretrained(layout, use_safetensors=files[0].suffix == ".safetensors", **kwargs)
    model.register_to_config(_name_or_path=str(folder))
    return model


def check_dtype(torch_dtype: torch.dtype | None) -> None:
    """Raises `ValueError` for what is not a dtype, in whose place diffusers would load float32."""
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"torch_dtype must be a torch.dtype such as torch.bfloat16, but got {torch_dtype!r}")


def check_text_encoder(folder: Path, variant: str | None = None) -> list[Path]:
    """Compares the weights in files with those of T5's encoder; the errors are those of `load_model`.

    Returns:
        The files.
    """
    files = weight_files(model_folder(folder, ""), variant, TRANSFORMERS_NAMES)
    config = T5Config.from_pretrained(folder)
    with init_empty_weights():
        model = T5EncoderModel(config)

    def known(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        # The embedding has two names, of which a file may hold either; a file of a whole T5 holds its decoder too.
        names = {name: name.replace("encoder.embed_tokens.", "shared.") for name in shapes}
        return {names[name]: shape for name, shape in shapes.items() if not name.startswith(("decoder.", "lm_head."))}

    expected = known({name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    found = known(_shapes(files))
    if getattr(config, "quantization_config", None):
        found = _as_before_quantization(expected, found)
    _compare(expected, found, folder, "T5EncoderModel")
    return files


def load_text_encoder(folder: Path, torch_dtype: torch.dtype, variant: str | None = None) -> T5EncoderModel:
    """Loads T5's encoder; the errors are those of `load_model`."""
    check_dtype(torch_dtype)
    files = check_text_encoder(folder, variant)
    with _plain_layout(folder, files, TRANSFORMERS_NAMES) as layout:
        return T5EncoderModel.from_pretrained(layout, dtype=torch_dtype)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """Loads T5's tokenizer, from `spiece.model` alone if need be.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: if there is `spiece.model` alone and protobuf, with which it is read, is missing.
    """
    if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise FileNotFoundError(f"there is no tokenizer in {str(folder)!r}: expected spiece.model or tokenizer.json")
    if not (folder / "tokenizer.json").is_file() and not is_protobuf_available():
        raise ImportError(f"{str(folder / 'spiece.model')!r} is read with protobuf: pip install protobuf")
    return T5Tokenizer.from_pretrained(folder)


def load_scheduler(folder: Path) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """Loads the scheduler that the folder's config names; DDIM, the published one, for a class unknown here.

    Raises:
        FileNotFoundError: if there is no config.
    """
    if not (folder / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"there is no scheduler_config.json in {str(folder)!r}")
    name = CogVideoXDDIMScheduler.load_config(folder).get("_class_name")
    cls = CogVideoXDPMScheduler if name == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    return cls.from_pretrained(folder)


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in several files. Raises `ValueError` if two hold the same weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        found = weight_shapes(file)
        twice = sorted(shapes.keys() & found.keys())
        if twice:
            raise ValueError(
                f"{str(file)!r} holds {twice[0]} again, which another file beside it has: keep one of them"
            )
        shapes.update(found)
    return shapes


def _compare(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path, model: str
) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not one of its weights" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {found[name]} instead of {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the weights in {str(folder)!r} do not fit {model}: {shown}")


@contextmanager
def _plain_layout(folder: Path, files: list[Path], names: tuple[str, str]) -> Generator[Path]:
    """A temporary folder with links to the config and to these files alone, under the names that libraries look for first.

    Args:
        names: of a single file, `.safetensors` and `.bin`; several are listed in an index of that name.
    """
    name = names[0 if files[0].suffix == ".safetensors" else 1]
    with tempfile.TemporaryDirectory() as temporary:
        layout = Path(temporary)
        (layout / CONFIG_NAME).symlink_to((folder / CONFIG_NAME).resolve())
        if len(files) == 1:
            (layout / name).symlink_to(files[0].resolve())
        else:
            for file in files:
                (layout / file.name).symlink_to(file.resolve())
            weight_map = {weight: file.name for file in files for weight in weight_shapes(file)}
            (layout / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield layout


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights names; the errors are those of `weight_files`."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of weights ({error!r}): fetch it again") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{str(index)!r} names weights that are not there: {', '.join(missing)}")
    return files


def _files_by_variant(folder: Path, names: tuple[str, str]) -> dict[str | None, list[Path]]:
    """A folder's `.safetensors` files, or its `.bin` files where there are none, of each variant. None is no variant."""
    stem = re.escape(Path(names[0]).stem), re.escape(Path(names[1]).stem)
    shard = r"(?:-\d+-of-\d+)?"
    named = re.compile(rf"(?:{stem[0]}|{stem[1]}){shard}\.(.+?){shard}")
    files: dict[str | None, list[Path]] = {}
    for pattern in ("*.safetensors", "*.bin"):
        found: dict[str | None, list[Path]] = {}
        for file in sorted(folder.glob(pattern)):
            match = named.fullmatch(file.stem)
            found.setdefault(match and match[1], []).append(file)
        files = found | files
    return files


def _as_before_quantization(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Puts the weights that a quantized model was made from in place of what is stored for them.

    A quantized weight is stored as parts (torchao's `x._weight_qdata` and `x._weight_scale`) or packed, beside further
    values (bitsandbytes' `x.weight.absmax`, `x.SCB`), all under the name of its module `x`.
    """
    modules = {name.rpartition(".")[0] for name in expected}
    plain, quantized = {}, set()
    for name, shape in found.items():
        module = name
        while module and module not in modules:
            module = module.rpartition(".")[0]
        if expected.get(name) == shape or not module:
            plain[name] = shape
        else:
            quantized.add(module)
    weights = (f"{module}.weight" for module in quantized)
    return plain | {weight: expected[weight] for weight in weights if weight in expected}
