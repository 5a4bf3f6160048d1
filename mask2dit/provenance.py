"""What something was made with: written beside every video and every training run."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def git_commit() -> str | None:
    """The commit of the source this runs from, if it runs from a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    result = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
