"""What something was made with: written beside every video and every training run."""

import shutil
import subprocess
from collections.abc import Container, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mask2dit", "torch", "diffusers", "transformers", "accelerate", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # deepspeed is an extra
    return found


def software() -> dict[str, Any]:
    """The part of a record that says which software made something."""
    return {"versions": versions(), "git_commit": git_commit()}


def describe_changes(then: Mapping[str, Any], now: Mapping[str, Any], ignore: Container[str] = ()) -> str:
    """Lists the settings that differ, as `key (1 then, 2 now)`.

    Args:
        then: what something was made with.
        now: what is asked for. A key that one side lacks counts as None there.
        ignore: keys that may differ.

    Returns:
        "" if nothing differs.
    """
    differing = [key for key in {**now, **then} if key not in ignore and then.get(key) != now.get(key)]
    return ", ".join(f"{key} ({then.get(key)!r} then, {now.get(key)!r} now)" for key in differing)


def git_commit() -> str | None:
    """The commit of the source this runs from, if it runs from a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    result = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
