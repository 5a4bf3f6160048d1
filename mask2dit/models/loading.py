"""Reading model folders: trained with this package, released by the authors, or plain CogVideoX.

A folder's weights are checked against the model from the files' headers, before anything is loaded: nothing missing,
nothing unknown, no other shape. Loading itself is diffusers': each weight goes straight to its dtype and device.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import is_protobuf_available

CONFIG_NAME = "config.json"
MIB = 2**20


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


def weight_files(folder: Path) -> list[Path]:
    """The weights of one model: what its index names, else the file of diffusers' name, else every `.safetensors`, else
    every `.bin`.

    Raises:
        FileNotFoundError: if there are none, or a file that the index names is missing.
        ValueError: if the index is corrupt.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")) + sorted(folder.glob("*.bin.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(index)!r} is no index of weights ({error!r}): fetch it again") from error
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{str(index)!r} names weights that are not there: {', '.join(missing)}")
        return files
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no weights: expected .safetensors or .bin files in it")
    return files


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


def empty_model(cls: type, folder: Path) -> torch.nn.Module:
    """A diffusers model as its `config.json` describes it, on the "meta" device: all of it but the weights."""
    config = cls.load_config(folder)
    known = cls._get_init_keys(cls)
    with init_empty_weights():
        return cls(**{key: value for key, value in config.items() if key in known})


def check_weights(model: torch.nn.Module, folder: Path, files: list[Path]) -> None:
    """Compares the weights in files with those that a model (on any device, "meta" too) has.

    Raises:
        ValueError: naming the weights that are missing, unknown or of another shape.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    _compare(expected, _shapes(files), folder, type(model).__name__)


def load_model(cls: type, from_pretrained: Callable, folder: Path, **kwargs) -> torch.nn.Module:
    """Loads a diffusers model after checking its files.

    Args:
        cls: the model's class.
        from_pretrained: diffusers' `from_pretrained` of that class.
        folder: the folder with `config.json` and weights.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if a file is corrupt or its weights do not fit the model.
    """
    files = weight_files(folder)
    check_weights(empty_model(cls, folder), folder, files)
    with _diffusers_layout(folder, files) as layout:
        # Said outright, since diffusers looks for the other kind first and reports an error on the way.
        return from_pretrained(layout, use_safetensors=files[0].suffix == ".safetensors", **kwargs)


def check_text_encoder(folder: Path) -> None:
    """Compares the weights in files with those of T5's encoder; the errors are those of `load_model`."""
    files = weight_files(model_folder(folder, ""))
    with init_empty_weights():
        model = T5EncoderModel(T5Config.from_pretrained(folder))

    def known(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        # The embedding has two names, of which a file may hold either; a file of a whole T5 holds its decoder too.
        names = {name: name.replace("encoder.embed_tokens.", "shared.") for name in shapes}
        return {names[name]: shape for name, shape in shapes.items() if not name.startswith(("decoder.", "lm_head."))}

    expected = known({name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    _compare(expected, known(_shapes(files)), folder, "T5EncoderModel")


def load_text_encoder(folder: Path, torch_dtype: torch.dtype) -> T5EncoderModel:
    """Loads T5's encoder; the errors are those of `load_model`."""
    check_text_encoder(folder)
    return T5EncoderModel.from_pretrained(folder, dtype=torch_dtype)


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


def fingerprint(path: str | os.PathLike) -> str:
    """A short name for a weights file, or for the weights, configurations and tokenizer in a folder, wherever it lies.

    Files of up to 64 MiB are read whole. Of larger ones, 64 KiB of every 4 MiB are, which no tensor of a large model slips
    through, since reading tens of gigabytes would take minutes.
    """
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(_model_files(path)) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as contents:
            if size <= 64 * MIB:
                digest.update(contents.read())
                continue
            for start in range(0, size, 4 * MIB):
                contents.seek(start)
                digest.update(contents.read(MIB // 16))
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> Iterator[Path]:
    """What makes up a model, and not what lies beside it, such as a readme or a download's cache."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and not hidden and file.is_file():
            yield file


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
def _diffusers_layout(folder: Path, files: list[Path]) -> Iterator[Path]:
    """The folder itself where diffusers can read it; otherwise a temporary one with links to its files and the index
    that several files, or files of another name, lack."""
    base = SAFETENSORS_WEIGHTS_NAME if files[0].suffix == ".safetensors" else WEIGHTS_NAME
    index_name = f"{base}.index.json"
    if (folder / index_name).is_file() or [file.name for file in files] == [base]:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        layout = Path(temporary)
        for file in [folder / CONFIG_NAME, *files]:
            (layout / file.name).symlink_to(file.resolve())
        weight_map = {name: file.name for file in files for name in weight_shapes(file)}
        (layout / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield layout
