import numpy as np
import pytest

from mask2dit.inference.config import InferenceConfig
from mask2dit.video.writing import write_video


@pytest.fixture
def config(small_model, tmp_path):
    """A configuration of the small model that takes a second."""

    def make(**changes) -> InferenceConfig:
        return InferenceConfig(
            **{
                "model": str(small_model),
                "prompts": ["a fox", "a lake"],
                "height": 64,
                "width": 96,
                "num_frames": 9,
                "num_inference_steps": 1,
                "dtype": "float32",
                "device": "cpu",
                "save_path": str(tmp_path / "out"),
                **changes,
            }
        )

    return make


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, np.full((30, 80, 120, 3), 90, dtype=np.uint8), fps=8)
    return str(path)
