"""What the small world's own model can be asked for: it knows this world's captions and nothing else."""

import os
from collections.abc import Sequence
from pathlib import Path

from mask2dit.files import read_json
from mask2dit.storyworld.world import parse_caption

MARKER = "storyworld.json"  # in the folder of a model of this world: what it was trained with


def check_prompts(model: str | os.PathLike, prompts: Sequence[str], window: int | None) -> None:
    """Checks what is asked of a model of the small world; any other model's prompts are let pass.

    Args:
        model: the model's folder.
        prompts: one text for every scene.
        window: scenes that are made at once; None: all.

    Raises:
        ValueError: if a prompt is no caption of this world, or more scenes are made at once than in training; the message
            says what is possible.
    """
    marker = Path(model) / MARKER
    if not marker.is_file():
        return
    for prompt in prompts:
        parse_caption(prompt)
    trained = read_json(marker, "fetch the model again")["num_scenes"]
    at_once = min(window or len(prompts), len(prompts))
    if at_once > trained:
        raise ValueError(
            f"{at_once} scenes at once are more than the {trained} that the model in {str(model)!r} was trained with: set "
            f"window={trained}, which goes on from the last scenes"
        )
