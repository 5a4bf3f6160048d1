"""Packages that only curation needs."""

import importlib
from types import ModuleType


def import_optional(name: str) -> ModuleType:
    """Imports a module of the extra `curation`.

    Raises:
        ValueError: if it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the package of {name!r} is missing: pip install 'mask2dit[curation]'") from error
