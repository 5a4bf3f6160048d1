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
        path: the YAML file. None: only the defaults and the overrides.
        overrides: such as ["seed=1", "prompts=[one, two]"], which win over the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that the schema lacks, a value of the wrong type, or anything that is no YAML mapping.
    """
    config = OmegaConf.structured(schema)
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration file {str(path)!r}")
        try:
            config = OmegaConf.merge(config, OmegaConf.load(path))
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {_one_line(error, config)}") from error
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"overrides have the form key=value, but this one is {override!r}")
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{override}: {_one_line(error, config)}") from error
    return OmegaConf.to_object(config)


def _one_line(error: Exception, config) -> str:
    """What is wrong and, for an unknown key, what it may have meant."""
    if isinstance(error, ConfigKeyError):
        key = error.full_key or str(error.key)
        known = [str(name) for name in config]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"there is no key {key!r}; {hint}"
    key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
    return key + " ".join(str(error).split("\n    full_key")[0].split())
