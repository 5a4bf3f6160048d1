"""Configuration files: a YAML for each task, read into the dataclass that gives every key its type and its meaning."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


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
            given = OmegaConf.load(path)
            if Path(path).suffix == ".json" and "config" in given:
                given = given.config
            config = OmegaConf.merge(config, given)
        for override in overrides:
            if "=" not in override:
                raise ValueError("overrides have the form key=value, after the configuration file")
            source = override
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        source = path
        return OmegaConf.to_object(config)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        where = f"{source}: " if source is not None else ""
        raise ValueError(f"{where}{_explain(error, config)}") from error


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
