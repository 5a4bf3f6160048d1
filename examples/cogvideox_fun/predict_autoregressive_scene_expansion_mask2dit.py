"""Continues a story from given scenes, with one prompt per scene.

Usage: python predict_autoregressive_scene_expansion_mask2dit.py [CONFIG.yaml] [key=value …]
"""

import sys
from pathlib import Path

from mask2dit.command import run_command
from mask2dit.inference.config import InferenceConfig

CONFIG = Path(__file__).parents[2] / "configs/inference/extension.yaml"

if __name__ == "__main__":
    sys.exit(run_command(InferenceConfig, "mask2dit.inference.run:generate", CONFIG, sys.argv[1:]))
