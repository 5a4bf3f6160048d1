"""The symmetric binary attention mask of Mask²DiT (arXiv 2503.19881) between the text and video of scenes.

A scene's own text and video always see each other. The five variants differ in three symmetric relations between scenes:

| variant | video-video | text-text | text-video |
|---------|-------------|-----------|------------|
| v1      | -           | -         | -          | scenes isolated
| v2      | yes         | -         | -          | Mask²DiT
| v3      | yes         | yes       | -          | ShotAdapter's mask
| v4      | yes         | -         | yes        |
| v5      | yes         | yes       | yes        | full attention

v2 and v5 are published; v1, v3 and v4 are inferred from the paper's ablation.
"""

from typing import NamedTuple

import torch

from mask2dit.scenes import SceneLayout


class CrossScene(NamedTuple):
    """Relations by which tokens of *different* scenes see each other."""

    video_video: bool
    text_text: bool
    text_video: bool


MASK_VARIANTS = {
    "v1": CrossScene(video_video=False, text_text=False, text_video=False),
    "v2": CrossScene(video_video=True, text_text=False, text_video=False),
    "v3": CrossScene(video_video=True, text_text=True, text_video=False),
    "v4": CrossScene(video_video=True, text_text=False, text_video=True),
    "v5": CrossScene(video_video=True, text_text=True, text_video=True),
}


def cross_scene(variant: str) -> CrossScene:
    """Returns the relations of a mask variant. Raises `ValueError` for an unknown variant."""
    if variant not in MASK_VARIANTS:
        raise ValueError(f"mask_variant has to be one of {', '.join(MASK_VARIANTS)}, but is {variant!r}")
    return MASK_VARIANTS[variant]


def dense_mask(layout: SceneLayout, variant: str) -> torch.BoolTensor:
    """Builds the mask as a matrix: the oracle that tests and benchmarks compare the grouped calls with.

    Args:
        layout: the N tokens of the sequence.
        variant: "v1" … "v5".

    Returns:
        (N, N) bools, True where the query (row) may see the key (column). At full size it would take 2.8 GB, so no
        production path builds it.

    Raises:
        ValueError: for an unknown variant.
    """
    cross = cross_scene(variant)
    lengths = torch.tensor(layout.text_lengths + layout.video_lengths)
    scene = torch.arange(layout.num_scenes).repeat(2).repeat_interleave(lengths)  # (N,)
    is_text = torch.arange(layout.length) < layout.text_length  # (N,)

    both_text = is_text[:, None] & is_text[None, :]
    both_video = ~is_text[:, None] & ~is_text[None, :]
    across = torch.full((layout.length, layout.length), cross.text_video)
    across[both_text] = cross.text_text
    across[both_video] = cross.video_video
    return across | (scene[:, None] == scene[None, :])
