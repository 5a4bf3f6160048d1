"""Mask²DiT: long videos of several scenes from a diffusion transformer with two masks (CVPR 2025, arXiv 2503.19881).

Names are imported on first use, so `import mask2dit` is fast: it loads no torch, diffusers, deepspeed or PyAV.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Mask2DiTPipeline": "mask2dit.pipelines.mask2dit",
    "Mask2DiTTransformer3DModel": "mask2dit.models.transformer",
    "SceneLayout": "mask2dit.scenes",
    "generate_story": "mask2dit.pipelines.story",
}
__all__ = [
    "Mask2DiTPipeline",
    "Mask2DiTTransformer3DModel",
    "SceneLayout",
    "__version__",
    "generate_story",
]

if TYPE_CHECKING:
    from mask2dit.models.transformer import Mask2DiTTransformer3DModel
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
    from mask2dit.pipelines.story import generate_story
    from mask2dit.scenes import SceneLayout


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mask2dit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
