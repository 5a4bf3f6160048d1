"""Short names for what something was made from: settings, and the files of a model."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20


def digest(content: object, length: int = 16) -> str:
    """Hashes any JSON value to so many hexadecimal digits. Values that JSON cannot hold count as their `str`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:length]


def fingerprint(path: str | os.PathLike) -> str:
    """A short name for a weights file, or for the weights, configurations and tokenizer in a folder, wherever it lies.

    Files of up to 64 MiB are read whole. Of larger ones, 64 KiB of every 4 MiB are, which no tensor of a large model slips
    through, since reading tens of gigabytes would take minutes.
    """
    path = Path(path)
    hasher = hashlib.sha256()
    for file in sorted(_model_files(path)) if path.is_dir() else [path]:
        size = file.stat().st_size
        hasher.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as contents:
            if size <= 64 * MIB:
                hasher.update(contents.read())
                continue
            for start in range(0, size, 4 * MIB):
                contents.seek(start)
                hasher.update(contents.read(MIB // 16))
    return hasher.hexdigest()[:16]


def _model_files(folder: Path) -> Iterator[Path]:
    """What makes up a model, and not what lies beside it, such as a readme or a download's cache."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and not hidden and file.is_file():
            yield file
