"""Configuration files: a YAML for each task, read into the dataclass that gives every key its type and its meaning."""

import difflib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from mask2dit.texts import parse_json, read_text

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file and `key=value` overrides into a dataclass.

    Args:
        schema: the dataclass; its fields are the known keys, their types what a value is converted to.
        path: the YAML file; or the JSON record of a run, whose "config" is taken. None: the defaults and the overrides.
        overrides: such as ["seed=1", "prompts=[one, two]"], which win over the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that the schema lacks, a value of the wrong type, or anything that is no YAML mapping.
    """
    config = OmegaConf.structured(schema)
    source = path
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file {str(path)!r}")
    try:
        if path is not None:
            if Path(path).suffix.lower() == ".json":
                # Not by a YAML parser, which takes an escaped emoji for two characters.
                given = OmegaConf.create(parse_json(read_text(Path(path), "configuration file")))
                given = given.config if "config" in given else given
            else:
                given = OmegaConf.load(path)
            config = OmegaConf.merge(config, given)
        for override in overrides:
            if "=" not in override:
                raise ValueError("overrides have the form key=value, after the configuration file")
            source = override
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        source = path
        loaded = OmegaConf.to_object(config)
        _check_all_finite(loaded)
        return loaded
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, RecursionError) as error:
        where = f"{source}: " if source is not None else ""
        raise ValueError(f"{where}{_explain(error, config)}") from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises `ValueError`, which names the key, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} has to be one of {', '.join(choices)}, but is {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raises `ValueError`, which names the key, for an infinity, NaN, or anything else that is not a number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value} has to be a finite number")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises `ValueError`, which names the key, for a value below the least, or one that is not finite."""
    check_finite(name, value)
    if value < least:
        raise ValueError(f"{name}={value} has to be at least {least}")


def check_positive(name: str, value: float) -> None:
    """Raises `ValueError`, which names the key, for a value that is not more than 0, or not finite."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value} has to be more than 0")


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raises `ValueError`, which names the key, for a value outside [least, most], or one that is not finite."""
    check_finite(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name}={value} has to lie between {least} and {most}")


def check_file_name(name: str, value: str, suffix: str) -> None:
    """Raises `ValueError`, which names the key, unless `value + suffix` is a plain file name."""
    is_control = [unicodedata.category(character) in ("Cc", "Cs") for character in value]
    if not value.strip() or value.startswith(".") or {"/", "\\"} & set(value) or any(is_control):
        raise ValueError(
            f"{name}={value!r} has to be a file name without suffix, which does not begin with a dot and has no slash or "
            "control character: put a folder into save_path"
        )
    if len(f"{value}{suffix}".encode()) > 255:
        raise ValueError(f"{name}={value[:20]}… has {len(value)} characters, too many for a file name")


def parse_shard(shard: str) -> tuple[int, int]:
    """The numbers of "i/n", the i-th of n parts of the work, counted from 0.

    Raises:
        ValueError: for anything else.
    """
    index, slash, count = shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"shard has to be i/n with i from 0 to n - 1, such as 0/1, but is {shard!r}")
    return int(index), int(count)


def _check_all_finite(value: Any, key: str = "") -> None:
    """Raises `ValueError`, which names the key, for an infinity or NaN anywhere in a configuration."""
    if is_dataclass(value):
        for field in fields(value):
            _check_all_finite(getattr(value, field.name), f"{key}.{field.name}".removeprefix("."))
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_all_finite(item, key)
    elif isinstance(value, float):
        check_finite(key, value)


def _explain(error: Exception, config) -> str:
    """What is wrong, in one line and without OmegaConf's own words; for an unknown key, what it may have meant."""
    message = " ".join(str(error).split("\n    full_key")[0].split())
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):
        key = key or str(error.key)
        group = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        known = [f"{key.rpartition('.')[0]}.{name}".removeprefix(".") for name in group]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"there is no key {key!r}; {hint}"
    if "is not a ListConfig" in message:
        return f"{key} has to be a list, such as {key}=[…]"
    if "is not a subclass of" in message:
        return "this is a group of keys, each of which is set by itself, as in lora.path=…"
    if "Incompatible value 'None'" in message:
        return f"{key} needs a value"
    if "incompatible container types" in message or isinstance(error, TypeError):
        return "it has to hold keys and values"
    return f"{key}: {message}" if key else message
