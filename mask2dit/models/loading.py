"""Reading model folders: trained with this package, released by the authors, or plain CogVideoX.

Before anything is loaded, the files' headers are checked against the model: no weight may be missing, unknown or of another
shape. diffusers then loads each weight directly to its dtype and device.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, ModelMixin, SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from safetensors import SafetensorError, safe_open
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import is_protobuf_available

from mask2dit.config import SAMPLERS
from mask2dit.models.quantization import check_unquantized, quantization_config

CONFIG_NAME = "config.json"
DIFFUSERS_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
TRANSFORMERS_NAMES = ("model.safetensors", "pytorch_model.bin")
# Components with weights, and the names that their libraries look for
COMPONENT_NAMES = {"text_encoder": TRANSFORMERS_NAMES, "vae": DIFFUSERS_NAMES, "transformer": DIFFUSERS_NAMES}


def model_folder(folder: str | os.PathLike, subfolder: str | None, default: str = "") -> Path:
    """Returns the folder with a model's `config.json`: `folder/subfolder` or, without a subfolder, `folder` itself or its
    subfolder named `default`.

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
    """Raises `FileNotFoundError` if a part of a model, or a file in it, is a broken link."""
    for part in parts:
        for path in (folder / part, *(folder / part).glob("*")):
            if path.is_symlink() and not path.exists():
                raise FileNotFoundError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there: put it back, or make the folder "
                    "whole where it is (export with copy_frozen=true, or copy it with cp -rL)"
                )


def weight_files(folder: Path, variant: str | None = None, names: tuple[str, str] = DIFFUSERS_NAMES) -> list[Path]:
    """Returns the weights files of one model, the only ones that are checked and loaded.

    `.safetensors` files take precedence over `.bin` files. Within either, the files of an index take precedence over a file
    with the library's own name, and that over any others. A folder with a single variant does not need `variant`.

    Args:
        variant: the variant in file names, such as "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
        names: the library's names for a single `.safetensors` and a single `.bin` file.

    Raises:
        FileNotFoundError: if there are none, none of this variant, or a file that the index names is missing.
        ValueError: if the index is corrupt, or the folder holds several variants and none is selected.
    """
    chosen = choose_weights(
        _file_names(folder), variant, names, lambda index: index_names(folder / index), str(folder)
    )
    missing = [name for name in chosen if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the index in {str(folder)!r} names weights that are not there: {', '.join(missing)}")
    return [folder / name for name in chosen]


def choose_weights(
    available: Collection[str],
    variant: str | None,
    names: tuple[str, str],
    read_index: Callable[[str], list[str]],
    where: str,
) -> list[str]:
    """Chooses the weights among the file names of a model, by the rules of `weight_files`.

    Args:
        available: names of the files of one model.
        variant, names: as for `weight_files`.
        read_index: returns the file names that an index lists.
        where: the folder, for messages.

    Raises:
        FileNotFoundError, ValueError: as `weight_files`.
    """
    for name in names:
        index, file = _add_variant(f"{name}.index.json", variant), _add_variant(name, variant)
        if index in available:
            return read_index(index)
        if file in available:
            return [file]
    by_variant = _names_by_variant(available, names)
    if variant in by_variant:
        return by_variant[variant]
    others = ", ".join(sorted(by_variant.keys() - {None}))
    if variant is not None:
        raise FileNotFoundError(
            f"{where!r} holds no weights of the variant {variant!r} (its variants: {others or 'none'})"
        )
    if len(by_variant) == 1:
        return choose_weights(available, others, names, read_index, where)
    if by_variant:
        raise ValueError(f"{where!r} holds weights of the variants {others}: pass one of them as variant")
    raise FileNotFoundError(f"{where!r} holds no weights: expected .safetensors or .bin files in it")


def has_variant(available: Collection[str], variant: str) -> bool:
    """Returns True if weights of a variant are among these file names."""
    return any(variant in _names_by_variant(available, names) for names in (DIFFUSERS_NAMES, TRANSFORMERS_NAMES))


def component_variants(files: Mapping[str, Collection[str]], variant: str | None, where: str) -> dict[str, str | None]:
    """Chooses the variant to load for each component: the given one where the component has it, else its plain weights.

    Args:
        files: file names of each component.
        variant: the variant that is asked for.
        where: the model, for messages.

    Raises:
        FileNotFoundError: if no component has the variant.
    """
    variants = {name: variant if variant and has_variant(files[name], variant) else None for name in files}
    if variant is not None and not any(variants.values()):
        raise FileNotFoundError(f"no component in {where!r} has weights of the variant {variant!r}")
    return variants


def folder_variants(
    folder: Path, variant: str | None, names: Iterable[str] = tuple(COMPONENT_NAMES)
) -> dict[str, str | None]:
    """Chooses the variant to load for each component in a folder, as `component_variants`."""
    return component_variants({name: _file_names(folder / name) for name in names}, variant, str(folder))


def _file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of the weights in a file without loading them. Never runs pickled code.

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
    """Builds a diffusers model without weights, on the "meta" device, from its `config.json`."""
    config = cls.load_config(folder)
    known = cls._get_init_keys(cls)
    with init_empty_weights():
        return cls(**{key: value for key, value in config.items() if key in known})


def check_weights(model: ModelMixin, folder: Path, files: list[Path]) -> None:
    """Compares the weights in files with those of a model, on any device including "meta".

    Raises:
        ValueError: for missing or unknown weights or other shapes, naming the weights.
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
        variant: the variant of the weights, see `weight_files`.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if a file is corrupt, its weights do not fit the model, or `torch_dtype` is not a dtype.
    """
    check_dtype(kwargs.get("torch_dtype"))
    files = weight_files(folder, variant)
    check_weights(empty_model(cls, folder), folder, files)
    with _plain_layout(folder, files, DIFFUSERS_NAMES) as layout:
        # Explicit, since diffusers would look for the other kind first and log an error.
        model = from_pretrained(layout, use_safetensors=files[0].suffix == ".safetensors", **kwargs)
    model.register_to_config(_name_or_path=str(folder))
    return model


def check_dtype(torch_dtype: torch.dtype | None) -> None:
    """Raises `ValueError` for anything but a dtype; diffusers would load float32 instead."""
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"torch_dtype must be a torch.dtype such as torch.bfloat16, but got {torch_dtype!r}")


def empty_text_encoder(folder: Path) -> T5EncoderModel:
    """Builds T5's encoder without weights, on the "meta" device, from its `config.json`."""
    config = T5Config.from_pretrained(folder)
    with init_empty_weights():
        model = T5EncoderModel(config)
    model.tie_weights()
    return model


def check_text_encoder(folder: Path, variant: str | None = None) -> list[Path]:
    """Compares the weights in files with those of T5's encoder. Raises the errors of `load_model`.

    Returns:
        The files.
    """
    files = weight_files(model_folder(folder, ""), variant, TRANSFORMERS_NAMES)
    model = empty_text_encoder(folder)

    def known(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        # A file may use either of two names for the embedding; a file of a complete T5 also holds the decoder.
        names = {name: name.replace("encoder.embed_tokens.", "shared.") for name in shapes}
        return {names[name]: shape for name, shape in shapes.items() if not name.startswith(("decoder.", "lm_head."))}

    expected = known({name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    found = known(_shapes(files))
    if getattr(model.config, "quantization_config", None):
        found = _as_before_quantization(expected, found)
    _compare(expected, found, folder, "T5EncoderModel")
    return files


def load_text_encoder(
    folder: Path, torch_dtype: torch.dtype, variant: str | None = None, quantization: str | None = None
) -> T5EncoderModel:
    """Loads T5's encoder, in a form of `mask2dit.models.quantization.FORMS` if one is named. Raises the errors of
    `load_model`."""
    check_dtype(torch_dtype)
    quantized = {}
    if quantization is not None:
        check_unquantized(json.loads((folder / CONFIG_NAME).read_text()), "the text encoder")
        quantized = {"quantization_config": quantization_config(quantization, torch_dtype, "transformers")}
    files = check_text_encoder(folder, variant)
    with _plain_layout(folder, files, TRANSFORMERS_NAMES) as layout:
        return T5EncoderModel.from_pretrained(layout, dtype=torch_dtype, **quantized)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """Loads T5's tokenizer, if necessary from `spiece.model` alone.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: if there is only `spiece.model`, and protobuf, which reads it, is not installed.
    """
    if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise FileNotFoundError(f"there is no tokenizer in {str(folder)!r}: expected spiece.model or tokenizer.json")
    if not (folder / "tokenizer.json").is_file() and not is_protobuf_available():
        raise ImportError(f"{str(folder / 'spiece.model')!r} is read with protobuf: pip install protobuf")
    return T5Tokenizer.from_pretrained(folder)


def load_scheduler(folder: Path) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """Loads the scheduler named in the folder's config; for an unknown class, DDIM, the published one.

    Raises:
        FileNotFoundError: if there is no config.
    """
    if not (folder / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"there is no scheduler_config.json in {str(folder)!r}")
    name = CogVideoXDDIMScheduler.load_config(folder).get("_class_name")
    cls = CogVideoXDPMScheduler if name == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    return cls.from_pretrained(folder)


def select_sampler(scheduler: SchedulerMixin, sampler: str) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """Returns the scheduler of a sampler, "ddim" or "dpm", with the noise schedule of another scheduler."""
    return getattr(diffusers, SAMPLERS[sampler]).from_config(scheduler.config)


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of the weights in several files. Raises `ValueError` if two hold the same weight."""
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
    """Yields a temporary folder with links to the config and to these files, under the names that libraries look for first.

    Args:
        names: the names for a single `.safetensors` and a single `.bin` file; several files are listed in an index.
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


def index_names(index: Path) -> list[str]:
    """Returns the file names listed in an index of weights. Raises `ValueError` if it is corrupt."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is not an index of weights ({error!r}): fetch it again") from error


def _names_by_variant(available: Collection[str], names: tuple[str, str]) -> dict[str | None, list[str]]:
    """Lists the `.safetensors` files, or the `.bin` files if there are none, by variant (None: no variant)."""
    stem = re.escape(Path(names[0]).stem), re.escape(Path(names[1]).stem)
    shard = r"(?:-\d+-of-\d+)?"
    named = re.compile(rf"(?:{stem[0]}|{stem[1]}){shard}\.(.+?){shard}")
    files: dict[str | None, list[str]] = {}
    for suffix in (".safetensors", ".bin"):
        found: dict[str | None, list[str]] = {}
        for name in sorted(available):
            if name.endswith(suffix):
                match = named.fullmatch(Path(name).stem)
                found.setdefault(match and match[1], []).append(name)
        files = found | files
    return files


def _as_before_quantization(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Replaces the stored parts of quantized weights by the weights that they were made from.

    A quantized weight is stored in parts (torchao's `x._weight_qdata` and `x._weight_scale`), or packed with further values
    (bitsandbytes' `x.weight.absmax`, `x.SCB`), all under the name of its module `x`.
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
