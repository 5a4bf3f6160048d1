"""Packages that only some tasks need."""

import importlib
from types import ModuleType


def import_optional(name: str, extra: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        name: the module.
        extra: this package's extra that installs it.

    Raises:
        ValueError: if it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the package of {name!r} is missing: pip install 'mask2dit[{extra}]'") from error
