"""The settings of encoders, for the configurations that hold them. Imports nothing heavy."""

from dataclasses import dataclass

from mask2dit.config import check_choice

PREPROCESSING = ("published", "vbench")


@dataclass(kw_only=True)
class ViCLIPConfig:
    weights: str | None = "models/ViCLIP/ViClip-InternVid-10M-FLT.pth"
    """The public weights."""
    build_untrained: bool = False
    """Build a tiny model with random weights there, if its name begins with "untrained". Its scores mean nothing."""
    preprocessing: str = "published"
    """published (stretched to a square, ImageNet's statistics) or vbench (centre crop, CLIP's statistics)."""

    def __post_init__(self):
        check_choice("viclip.preprocessing", self.preprocessing, PREPROCESSING)
