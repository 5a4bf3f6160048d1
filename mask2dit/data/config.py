"""The settings of training data. Imports nothing heavy, so that a mistake in them is reported at once."""

from dataclasses import dataclass, field

from mask2dit.config import DTYPES, check_at_least, check_between, check_choice, check_positive
from mask2dit.engine.config import EngineConfig

KINDS = ("pretrain", "finetune")
BASE_MODEL = "models/CogVideoX-5b"  # start of pre-training; fine-tuning keeps its VAE and text encoder


@dataclass(kw_only=True)
class DataConfig:
    """What training reads and how samples are made from it. The defaults are those of the published pre-training."""

    # The manifest
    kind: str = "pretrain"
    """Kind of samples: pretrain (num_scenes distinct random clips) or finetune (num_scenes consecutive scenes of a
    row)."""
    manifest: str = "datasets/pretrain.csv"
    """A .csv with one clip per row, or a .json with the consecutive scenes of one video per row."""
    data_root: str | None = None
    """Folder that the manifest's paths are relative to; null: the manifest's own folder."""

    # A sample
    num_scenes: int = 3
    """Scenes per sample."""
    num_frames: int = 49
    """Frames per scene."""
    height: int = 480
    """Height in pixels to which clips are resized and cropped."""
    width: int = 720
    """Width in pixels to which clips are resized and cropped."""
    max_stride: int = 3
    """Step between the frames of a scene: pre-training uses exactly this stride, fine-tuning the largest one up to it
    that fits."""
    num_windows: int | None = None
    """Number K of random frame ranges per clip: epoch e uses range e mod K. null: a new range every epoch."""
    seed: int = 0
    """Seed of the sample order and of every random choice within a sample."""

    # Unreadable clips
    max_retries: int = 2
    """Further attempts to read a clip before its sample is replaced."""
    max_quarantined_share: float = 0.01
    """Share of the manifest's clips, 0 to 1, that may be unreadable; the run stops above it."""

    # Latents and text embeddings computed ahead
    cache: str | None = None
    """Folder that `mask2dit cache` writes and training reads; null: training encodes each sample itself."""

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        if not self.manifest:
            raise ValueError("manifest is empty: name the .csv or .json file that lists the clips")
        for name in ("num_scenes", "num_frames", "height", "width", "max_stride"):
            check_at_least(name, getattr(self, name), 1)
        if self.num_windows is not None and self.num_windows < 1:
            raise ValueError(f"num_windows={self.num_windows} has to be at least 1, or null for a new one every epoch")
        if self.max_retries < 0:
            raise ValueError(f"max_retries={self.max_retries} has to be 0 or more")
        check_between("max_quarantined_share", self.max_quarantined_share, 0, 1)
        if self.cache is not None and self.num_windows is None:
            raise ValueError(
                "a cache holds a fixed number of windows of each clip: set num_windows=1 or more, or cache=null"
            )


@dataclass(kw_only=True)
class CacheConfig(EngineConfig):
    """What `mask2dit cache` computes. `configs/data/cache.yaml` sets every key."""

    model: str = BASE_MODEL
    """Model folder in diffusers' layout, or name on the Hugging Face Hub, whose VAE and text encoder are used."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""
    variant: str | None = None
    """Variant of the weights, such as fp16, where the model has several; null: the plain ones."""
    data: DataConfig = field(default_factory=lambda: DataConfig(num_windows=1, cache="datasets/cache"))
    """The same settings as in training; `data.cache` is the folder to write."""
    dtype: str = "bfloat16"
    """Data type of weights, latents and embeddings: float32, bfloat16 or float16. Training has to use the same."""
    device: str = "auto"
    """Device of the encoders: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    file_size: float = 256.0
    """Size of the cache's files in MiB. An interruption loses up to one file per process."""

    def __post_init__(self):
        super().__post_init__()
        self.check_resources(["encode"])
        check_positive("file_size", self.file_size)
        check_choice("dtype", self.dtype, DTYPES)
        if self.data.cache is None:
            raise ValueError("data.cache has to name the folder to write, but is null")


@dataclass(kw_only=True)
class CheckConfig(DataConfig):
    """What `mask2dit check` checks. The keys are those of `data` in training."""

    manifest: str = ""
    """The .csv or .json file to check. `mask2dit check story= --help` describes the keys for a story file."""

    # The model
    model: str | None = None
    """Model to train, a folder or a name on the Hugging Face Hub, whose text window captions should fit; null: the length of
    captions is not checked."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""

    def __post_init__(self):
        if not self.manifest:
            raise ValueError("name the manifest to check, such as datasets/pretrain.csv")
        super().__post_init__()
