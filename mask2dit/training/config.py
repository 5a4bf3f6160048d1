"""The settings of training. Imports nothing heavy, so that a mistake in them is reported at once."""

from dataclasses import dataclass, field

from mask2dit.config import QUANTIZATIONS, check_at_least, check_between, check_choice, check_finite, check_positive
from mask2dit.data.config import BASE_MODEL, DataConfig

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # and their dtypes
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
GIVEN_SCENES = ("last", "random")


@dataclass(kw_only=True)
class LoRATrainingConfig:
    """LoRA: low-rank additions to train instead of all weights."""

    rank: int | None = None
    """Rank of the additions; null: train all weights."""
    alpha: int | None = None
    """Scale of the additions relative to the rank; null: equal to the rank."""
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Names of the linear layers that get additions."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} has to be at least 1, or null to train all weights")
        if self.alpha is not None:
            check_at_least("lora.alpha", self.alpha, 1)


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation during training: losses and stories, from fixed noise and seeds."""

    every: int = 0
    """Steps between validations of `manifest`, `stories` or both, each after a checkpoint; 0: none."""
    manifest: str | None = None
    """Held-out clips for the loss, in the format of `data.manifest`; null: no loss."""
    num_samples: int = 8
    """Number of held-out samples per validation."""
    timesteps: list[int] = field(default_factory=lambda: [100, 300, 500, 700, 900])
    """Timesteps, 0 to 999, at which the loss is measured."""
    stories: list[list[str]] = field(default_factory=list)
    """Stories to generate, one list of prompts per story, one prompt per scene; empty: none."""
    num_inference_steps: int = 50
    """Denoising steps of the generated stories."""
    guidance_scale: float = 6.0
    """Weight of classifier-free guidance of the generated stories."""
    seed: int = 0
    """Seed of the stories' noise, the same at every validation."""
    fps: int = 8
    """Frames per second of the generated stories."""

    def __post_init__(self):
        check_at_least("validation.every", self.every, 0)
        for name in ("num_samples", "num_inference_steps", "fps"):
            check_at_least(f"validation.{name}", getattr(self, name), 1)
        check_finite("validation.guidance_scale", self.guidance_scale)
        if self.every and not self.manifest and not self.stories:
            raise ValueError(
                f"validation.every={self.every} has nothing to validate: set validation.manifest or validation.stories, or "
                "validation.every=0"
            )


@dataclass(kw_only=True)
class TrainConfig:
    """The settings of a training run. `configs/train/*.yaml` hold those of the published runs."""

    # The model
    model: str = BASE_MODEL
    """Model folder, or name on the Hugging Face Hub, to start from: CogVideoX for pre-training, the pre-trained model for
    fine-tuning."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""
    variant: str | None = None
    """Variant of the weights, such as fp16, where the model has several; null: the plain ones."""
    mask_variant: str | None = None
    """Mask variant: v1, v2, v3, v4 or v5; null: the model's own, v2 for CogVideoX."""
    output_dir: str = "outputs/pretrain"
    """Folder for checkpoints, logs and the trained model of one run."""
    lora: LoRATrainingConfig = field(default_factory=LoRATrainingConfig)
    quantization: str | None = None
    """Form of the weights that LoRA keeps frozen: int8 or fp8 (torchao), bnb_int8 or nf4 (bitsandbytes, on a GPU); null:
    float32."""

    # The data
    data: DataConfig = field(default_factory=DataConfig)
    num_workers: int = 4
    """Processes per rank that read samples; 0: read in the training process."""

    # The objective
    conditional_probability: float = 0.0
    """Probability that a sample has given scenes: 0 in the published pre-training, 0.5 in fine-tuning."""
    given_scenes: str = "last"
    """Given scenes of such a sample: last (all but the last, as published) or random (a random subset)."""
    context_noise: int = 0
    """Highest timestep, below 1000, at which given scenes are noised. Each sample draws one from 0 (clean) to it, which the
    scenes carry; 0: always clean, as published."""
    timestep_shift: float = 1.0
    """Shift s of the drawn timesteps towards high noise, from the share u of the schedule to s u / (1 + (s - 1) u). 1: all
    timesteps equally often, as published; 3: half of the draws in the noisiest quarter."""
    text_dropout: float = 0.0
    """Probability that all prompts of a sample are dropped, for classifier-free guidance (published: 0)."""

    # The optimization
    max_steps: int = 10_000
    """Optimization steps."""
    batch_size: int = 8
    """Samples per optimization step, over all processes."""
    micro_batch_size: int = 1
    """Samples per forward pass of one process, or of `sequence_parallel` processes together; gradients are accumulated until
    the batch is complete."""
    optimizer: str = "adamw"
    """Optimizer: adamw, adamw8bit (needs bitsandbytes and a GPU), or muon (matrices of the blocks; AdamW trains the
    rest)."""
    learning_rate: float = 1e-5
    """Learning rate after the warm-up."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of AdamW's second moment."""
    adam_epsilon: float = 1e-10
    """Epsilon of AdamW."""
    weight_decay: float = 3e-2
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Steps at the end of `max_steps` over which the learning rate falls linearly to 0; it is constant between warm-up
    and decay."""
    max_grad_norm: float = 0.05
    """Gradient norm above which gradients are scaled down."""
    precision: str = "bf16"
    """Precision of the forward pass: fp32, bf16 or fp16."""
    gradient_checkpointing: int = 1
    """Checkpoint every n-th block (1: all blocks, 2: every other one); 0: none."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is exported in place of them; null: no average."""
    seed: int = 42
    """Seed of the noise, the timesteps, the given scenes and LoRA's initial weights."""

    # The engine
    compile: bool = False
    """Compile the transformer's blocks, for faster steps after a slow first step; not with ZeRO stage 3."""
    attention_backend: str | None = None
    """Attention backend of diffusers with a backward pass: native, _native_math, flash, …; null: torch's own choice."""
    sequence_parallel: int = 1
    """Processes that share each sample, for samples that do not fit one GPU. It has to divide the number of processes and
    the model's attention heads."""
    deepspeed: str | None = None
    """DeepSpeed configuration, such as a file in configs/deepspeed; null: plain data parallelism."""
    resume: str | None = None
    """Checkpoint folder to resume from, latest, or auto (the newest checkpoint if there is one, otherwise a new run); null: a
    new run."""

    # The output
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Number of the newest checkpoints to keep."""
    log_every: int = 10
    """Steps between log entries."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """List of trackers: tensorboard, wandb, both or none; metrics.jsonl is always written."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    copy_frozen: bool = False
    """Copy the frozen parts of the base model (VAE, text encoder, …) to the exported `model/`, so that it can be moved or
    shared on its own; false: link to them."""
    dry_run: bool = False
    """Print the memory that the run needs, without reading weights."""

    def __post_init__(self):
        for name, choices in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("given_scenes", GIVEN_SCENES)):
            check_choice(name, getattr(self, name), choices)
        for name in ("conditional_probability", "text_dropout"):
            check_between(name, getattr(self, name), 0, 1)
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "sequence_parallel",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            check_at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "timestep_shift"):
            check_positive(name, getattr(self, name))
        for name in ("warmup_steps", "decay_steps", "gradient_checkpointing", "num_workers", "weight_decay"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 0 and less than 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} has to be between 0 and 1, or be null")
        check_between("context_noise", self.context_noise, 0, 999)
        if self.context_noise and not self.conditional_probability:
            raise ValueError(
                f"context_noise={self.context_noise} needs given scenes: set conditional_probability, or context_noise=0"
            )
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
            if self.lora.rank is None:
                raise ValueError(
                    f"quantization={self.quantization} freezes the weights: set lora.rank to train additions"
                )
            if self.deepspeed is not None:
                raise ValueError(
                    f"quantization={self.quantization} cannot be used with deepspeed, which converts all weights to its own "
                    "dtype: leave out one of them"
                )
        if self.conditional_probability and self.data.num_scenes < 2:
            raise ValueError(
                f"conditional_probability={self.conditional_probability} needs at least 2 scenes per sample, but "
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
