"""The settings of encoders, for the configurations that hold them. Imports nothing heavy."""

from dataclasses import dataclass

from mask2dit.config import check_choice

PREPROCESSING = ("published", "vbench")


@dataclass(kw_only=True)
class ViCLIPConfig:
    """ViCLIP, which embeds videos and texts for consistency measures."""

    weights: str | None = "models/ViCLIP/ViClip-InternVid-10M-FLT.pth"
    """ViCLIP's public weights; null: consistency is not measured."""
    build_untrained: bool = False
    """Build a tiny model with random weights at that path if there is none. Its name has to begin with "untrained"; its
    scores mean nothing."""
    preprocessing: str = "published"
    """published (stretched to a square, ImageNet's statistics) or vbench (centre crop, CLIP's statistics)."""

    def __post_init__(self):
        check_choice("viclip.preprocessing", self.preprocessing, PREPROCESSING)
