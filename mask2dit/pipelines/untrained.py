"""A small model folder with random weights, so that every command runs without a download.

`python -m mask2dit.pipelines.untrained FOLDER` writes it. Its parts have the classes and structure of Mask²DiT on
CogVideoX-5B, but are narrower and shallower: an autoencoder with 4 x 8 x 8 compression, a transformer with rotary
positions and 2 x 2 patches, a T5 v1.1 text encoder and its sentencepiece tokenizer.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mask2dit.command import run_command
from mask2dit.files import write_errors

MARKER = "UNTRAINED.md"  # the model card, which marks a model as untrained

MODEL_CARD = """\
# An untrained Mask²DiT

**The weights in this folder are random: the model is untrained.** What it draws is noise, blurred into blobs of
colour; it means nothing and has nothing to do with the prompts. The model is there so that every command runs, quickly
and on any machine, before real weights are in place. To see what the method can do, use those.

It has all parts of Mask²DiT on CogVideoX-5B, only much smaller. Its base size is 9 frames of 64 x 96 pixels (height x
width) per scene, and it reads 64 text tokens per scene.

`python -m mask2dit.pipelines.untrained FOLDER seed={seed}` wrote it.
"""


@dataclass(kw_only=True)
class UntrainedConfig:
    """Write a small model with random weights."""

    folder: str = "models/untrained-small"
    """Folder to write; an existing complete model is left unchanged."""
    seed: int = 0
    """Seed of the weights."""


def write_untrained(config: UntrainedConfig) -> None:
    """Writes the model and prints its folder."""
    print(build_untrained_model(config.folder, config.seed))


def build_untrained_model(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes a small but complete model with random weights, in diffusers' layout, for `Mask2DiTPipeline` to open.

    Its base size is 9 frames of 64 x 96 pixels per scene (3 latent frames of 8 x 12), and it reads 64 text tokens per
    scene. The same seed gives the same weights, byte for byte. The folder is written atomically. A folder that already
    holds a complete model, of any origin, is left unchanged. The caller's random generators are not affected.

    Args:
        folder: the folder to write; missing parents are created.
        seed: seed of the weights.

    Returns:
        The folder.

    Raises:
        FileExistsError: if `folder` is something else, or holds an incomplete model.
    """
    folder = Path(folder)
    if _is_complete(folder):
        return folder
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        raise FileExistsError(
            f"{str(folder)!r} is already there and holds no complete model: name another folder, or remove this one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_errors(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / "model"  # since the temporary folder itself is private to its user
        _write_model(written, seed)
        try:
            written.rename(folder)
        except OSError:
            if not _is_complete(folder):  # otherwise another process wrote the model first
                raise
    return folder


def is_untrained(folder: str | os.PathLike) -> bool:
    """Returns True if a model folder was written by this module."""
    return (Path(folder) / MARKER).is_file()


def _is_complete(folder: Path) -> bool:
    """Returns True if a folder holds all parts of a pipeline."""
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

    try:
        Mask2DiTPipeline.skeleton(folder)
    except FileNotFoundError:
        return False
    return True


def _write_model(folder: Path, seed: int) -> None:
    # Imported here, as above, so that the command line can be read and logging set up before diffusers is imported.
    from mask2dit.pipelines.untrained_parts import write_parts

    write_parts(folder, seed)
    (folder / MARKER).write_text(MODEL_CARD.format(seed=seed), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    return run_command(
        UntrainedConfig, "mask2dit.pipelines.untrained:write_untrained", None, arguments, positionals=("folder",)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
