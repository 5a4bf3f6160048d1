"""The settings of training data. Imports nothing heavy, so that a mistake in them shows at once."""

from dataclasses import dataclass, field

from mask2dit.config import DTYPES, check_at_least, check_between, check_choice, parse_shard

KINDS = ("pretrain", "finetune")
BASE_MODEL = "models/CogVideoX-5b"  # from which pre-training starts; fine-tuning keeps its VAE and text encoder


@dataclass(kw_only=True)
class DataConfig:
    """What training reads and how a sample is made of it. The defaults are the published pre-training."""

    # The manifest
    kind: str = "pretrain"
    """pretrain (a sample is num_scenes distinct random clips) or finetune (num_scenes consecutive scenes of a row)."""
    manifest: str = "datasets/pretrain.csv"
    """A .csv with one clip a row, or a .json with the consecutive scenes of one video a row."""
    data_root: str | None = None
    """The folder from which the manifest's paths start; null: the manifest's own."""

    # A sample
    num_scenes: int = 3
    num_frames: int = 49
    """Frames of a scene."""
    height: int = 480
    width: int = 720
    max_stride: int = 3
    """Step between the frames taken: pre-training takes exactly this, fine-tuning the largest from this down to 1 that
    fits."""
    num_windows: int | None = None
    """K random windows of frames a clip: epoch e takes window e mod K. null: a new one every epoch."""
    seed: int = 0
    """Of the order of samples and of every random choice in them."""

    # What cannot be read
    max_retries: int = 2
    """How often a clip that cannot be read is tried again before its sample is replaced."""
    max_quarantined_share: float = 0.01
    """The run stops once more than this share of the manifest's clips could not be read."""

    # Latents and text embeddings computed ahead
    cache: str | None = None
    """The folder to which `python -m mask2dit.data.cache` writes and from which training reads; null: training encodes
    each sample itself."""

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
class CacheConfig:
    """What `python -m mask2dit.data.cache` computes. `configs/data/cache.yaml` holds values for all of it."""

    model: str = BASE_MODEL
    """A folder in diffusers' layout, of which the VAE and the text encoder are used."""
    data: DataConfig = field(default_factory=DataConfig)
    """As in training; `data.cache` is the folder that is written."""
    dtype: str = "bfloat16"
    """Of weights, latents and embeddings: float32, bfloat16 or float16, and the same in training."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    shard: str = "0/1"
    """i/n: the i-th of n equal parts, so that n processes can share the work."""

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.data.cache is None:
            raise ValueError("data.cache has to name the folder to write, but is null")
        parse_shard(self.shard)
