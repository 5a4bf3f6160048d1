import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mask2dit/__init__.py").read_text(encoding="utf-8"))[1]

TRAINING = ["deepspeed>=0.19", "tensorboard>=2.18"]
EVALUATION = [
    "openai>=2",  # the judge and the writing of stories
    "scenedetect>=0.7",
]
CURATION = [
    "av>=14",
    "openai>=2",
    "opencv-python>=4.10",
    "scenedetect>=0.7",
]
DEVELOPMENT = ["pytest>=9", "pytest-xdist>=3.6", "ruff>=0.14", "scipy>=1.13"]

setup(
    name="mask2dit",
    version=VERSION,
    description="Mask²DiT: long videos of several scenes from a diffusion transformer with two masks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mask2dit", "mask2dit.*"]),
    package_data={"mask2dit.curation": ["review.html"]},
    python_requires=">=3.10",
    # Ranges that are known to work; requirements.txt pins what is tested.
    install_requires=[
        "accelerate>=1.10",
        "decord>=0.6",
        "diffusers>=0.42,<0.43",  # the transformer builds on internals of this version
        "einops>=0.8",
        "imageio-ffmpeg>=0.6",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "peft>=0.18",
        "pillow>=10.1",
        "protobuf>=7.36.1",  # without it transformers 5 cannot read a tokenizer that is spiece.model alone
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "torch>=2.6",
        "tqdm>=4.66",
        "transformers>=5,<6",
    ],
    extras_require={
        "training": TRAINING,
        "evaluation": EVALUATION,
        "curation": CURATION,
        "development": [*TRAINING, *EVALUATION, *CURATION, *DEVELOPMENT],
    },
)
