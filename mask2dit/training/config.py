"""The settings of training. Imports nothing heavy, so that a mistake in them shows at once."""

from dataclasses import dataclass, field

from mask2dit.config import check_at_least, check_between, check_choice, check_finite, check_positive
from mask2dit.data.config import BASE_MODEL, DataConfig

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
GIVEN_SCENES = ("last", "random")


@dataclass(kw_only=True)
class LoRATrainingConfig:
    """Train low-rank additions instead of all weights."""

    rank: int | None = None
    """null: train all weights."""
    alpha: int | None = None
    """null: as the rank."""
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} has to be at least 1, or null to train all weights")
        if self.alpha is not None:
            check_at_least("lora.alpha", self.alpha, 1)


@dataclass(kw_only=True)
class ValidationConfig:
    """What is measured and drawn during training, from fixed noise and fixed seeds."""

    every: int = 0
    """Steps between two validations; 0: none."""
    manifest: str | None = None
    """Held-out clips for the loss, in the format of `data.manifest`; null: no loss."""
    num_samples: int = 8
    """Samples of that manifest."""
    timesteps: list[int] = field(default_factory=lambda: [100, 300, 500, 700, 900])
    stories: list[list[str]] = field(default_factory=list)
    """Stories that are drawn, one text a scene each; empty: none."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    seed: int = 0
    fps: int = 8

    def __post_init__(self):
        check_at_least("validation.every", self.every, 0)
        for name in ("num_samples", "num_inference_steps", "fps"):
            check_at_least(f"validation.{name}", getattr(self, name), 1)
        check_finite("validation.guidance_scale", self.guidance_scale)


@dataclass(kw_only=True)
class TrainConfig:
    """What to train, on what, and how. `configs/train/*.yaml` hold values for all of it."""

    # The model
    model: str = BASE_MODEL
    """The folder to start from: CogVideoX for pre-training, its result for fine-tuning."""
    mask_variant: str | None = None
    """v1 … v5; null: the model's own, v2 for CogVideoX."""
    output_dir: str = "outputs/pretrain"
    """Checkpoints, logs and the trained model; one run only."""
    lora: LoRATrainingConfig = field(default_factory=LoRATrainingConfig)

    # The data
    data: DataConfig = field(default_factory=DataConfig)
    num_workers: int = 4

    # The objective
    conditional_probability: float = 0.0
    """How often a sample is an extension, with some scenes given (0 in pre-training, 0.5 in fine-tuning)."""
    given_scenes: str = "last"
    """Which scenes an extension is given: all but the last (published), or a random subset."""
    text_dropout: float = 0.0
    """How often all texts of a sample are dropped, for classifier-free guidance (published: never)."""

    # The optimisation
    max_steps: int = 10_000
    batch_size: int = 8
    """Samples of one optimisation step, over all processes."""
    micro_batch_size: int = 1
    """Samples of one process in one forward pass; gradients are accumulated until the batch is complete."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (needs bitsandbytes and a GPU), or muon (for the matrices of the blocks, with AdamW for the rest)."""
    learning_rate: float = 1e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-10
    weight_decay: float = 3e-2
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0; constant from then on, but for `decay_steps`."""
    decay_steps: int = 0
    """Of the steps up to `max_steps` the last ones, over which the learning rate falls linearly to 0."""
    max_grad_norm: float = 0.05
    precision: str = "bf16"
    gradient_checkpointing: int = 1
    """Recompute every n-th block in the backward pass: 1 all of them, 2 every other one; 0 none."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and export it; null: do not."""
    seed: int = 42

    # The engine
    deepspeed: str | None = None
    """A file of configs/deepspeed; null: plain data parallelism."""
    resume: str | None = None
    """latest, or a checkpoint's folder; null: a new run."""

    # The output
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    log_every: int = 10
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """tensorboard, wandb, both or none; metrics.jsonl is always written."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    copy_frozen: bool = False
    """Copy the frozen parts of the base model (VAE, text encoder, …) to the exported `model/`, so that it can be moved or
    shared by itself; false: link to them."""
    dry_run: bool = False
    """Print what the run would need, without reading weights."""

    def __post_init__(self):
        for name, choices in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("given_scenes", GIVEN_SCENES)):
            check_choice(name, getattr(self, name), choices)
        for name in ("conditional_probability", "text_dropout"):
            check_between(name, getattr(self, name), 0, 1)
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            check_at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            check_positive(name, getattr(self, name))
        for name in ("warmup_steps", "decay_steps", "gradient_checkpointing", "num_workers", "weight_decay"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 0 and less than 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} has to lie between 0 and 1, or be null")
        if self.conditional_probability and self.data.num_scenes < 2:
            raise ValueError(
                f"conditional_probability={self.conditional_probability} needs at least 2 scenes a sample, but "
                f"data.num_scenes={self.data.num_scenes}"
            )
        for story in self.validation.stories:
            if len(story) != self.data.num_scenes:
                raise ValueError(
                    f"a story of validation.stories has {len(story)} texts, but data.num_scenes={self.data.num_scenes}: "
                    f"{story}"
                )
        unknown = set(self.trackers) - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(f"trackers can be tensorboard and wandb, but not {', '.join(sorted(unknown))}")
