"""Checks prompts for the small world's own model, which knows this world's captions and nothing else."""

import os
from collections.abc import Sequence
from pathlib import Path

from mask2dit.files import read_json
from mask2dit.storyworld.world import parse_caption

MARKER = "storyworld.json"  # in the folder of a model of this world: the sizes it was trained with


def check_prompts(model: str | os.PathLike, prompts: Sequence[str], window: int | None) -> None:
    """Checks the prompts for a model of the small world. For any other model, all prompts pass.

    Args:
        model: the model's folder.
        prompts: one prompt per scene.
        window: scenes generated together; None: all.

    Raises:
        ValueError: if a prompt is not a caption of this world, or more scenes are generated together than in training; the
            message states the alternatives.
    """
    marker = Path(model) / MARKER
    if not marker.is_file():
        return
    for prompt in prompts:
        parse_caption(prompt)
    check_window(model, len(prompts), window)


def check_window(model: str | os.PathLike, num_scenes: int, window: int | None) -> None:
    """Checks how many scenes a model of the small world generates together. For any other model, any number passes.

    Raises:
        ValueError: if they are more than in training.
    """
    marker = Path(model) / MARKER
    if not marker.is_file():
        return
    trained = read_json(marker, "fetch the model again")["num_scenes"]
    at_once = min(window or num_scenes, num_scenes)
    if at_once > trained:
        raise ValueError(
            f"{at_once} scenes at once are more than the {trained} that the model in {str(model)!r} was trained with: set "
            f"window={trained}, which goes on from the last scenes"
        )
