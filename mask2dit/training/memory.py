"""The memory that a run needs, computed from shapes alone."""

import copy
from dataclasses import dataclass

import torch

from mask2dit.models.lora import target_layers
from mask2dit.models.quantization import quantized_bytes
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.training.config import PRECISIONS, TrainConfig
from mask2dit.training.engine import deepspeed_config

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one process in bytes, with the counts that it follows from."""

    parameters: int
    trainable: int
    tokens: int
    """Tokens of a sample."""
    own_tokens: int
    """Tokens of a sample that one process computes."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    optimizer_device: str
    available: int | None

    @property
    def total(self) -> int:
        on_device = self.weights + self.gradients + self.activations
        return on_device + (self.optimizer if self.optimizer_device == "device" else 0)

    def __str__(self) -> str:
        lines = [
            f"parameters          {self.parameters:,} ({self.trainable:,} trained)",
            f"tokens per sample   {self.tokens:,}"
            + ("" if self.own_tokens == self.tokens else f" ({self.own_tokens:,} per process)"),
            f"weights             {self.weights / GIB:8.2f} GiB per process",
            f"gradients           {self.gradients / GIB:8.2f} GiB",
            f"optimizer           {self.optimizer / GIB:8.2f} GiB ({self.optimizer_device})",
            f"activations, about  {self.activations / GIB:8.2f} GiB",
            f"total on the device {self.total / GIB:8.2f} GiB, besides VAE and text encoder",
        ]
        if self.available is None:
            lines.append("no GPU is here to compare it with")
        else:
            verdict = "fits" if self.total < self.available else "does not fit"
            lines.append(f"{verdict} the {self.available / GIB:.1f} GiB of this GPU")
        return "\n".join(lines)


def estimate_memory(config: TrainConfig, skeleton: Mask2DiTPipeline, num_processes: int) -> MemoryEstimate:
    """The memory of one process, with the run's engine.

    Weights, gradients and optimizer are counted. Without DeepSpeed, they take 4 + 4 + 8 bytes per trained parameter (the
    moments 2 for adamw8bit and 4 for muon) and, in 16 bits, 2 more for autocast's copies. Weights that LoRA keeps frozen
    take 4, and the copies of those of a checkpointed block last no longer than its pass; quantized ones are counted in their
    form, and the others beside them in the run's precision. With DeepSpeed, weights, gradients and optimizer take 2 + 2 + 12
    bytes in 16 bits, and ZeRO splits the optimizer (stage 1), gradients (2) and weights (3) over the processes (Rajbhandari
    et al. 2020, Sec. 3). Activations are estimated at 34 bytes per token and channel of a block in 16 bits
    (Korthikanti et al. 2022, Eq. 2, without the attention matrix), for every block that is not checkpointed and for one that
    is, plus the inputs that checkpointed blocks keep. With `sequence_parallel=n`, a process has an n-th of each scene's
    tokens.
    """
    transformer, data = skeleton.transformer, config.data
    _, latent_frames, (_, height, width) = skeleton.video_shape(
        data.height, data.width, data.num_frames, data.num_scenes
    )
    layout = transformer.scene_layout(height, width, latent_frames)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    trainable, frozen = parameters, 0
    if config.lora.rank:
        frozen = parameters
        adapted = target_layers(transformer, config.lora.target_modules)
        trainable = sum(config.lora.rank * sum(layer.weight.shape) for layer in adapted)
    half = config.precision != "fp32"
    engine = deepspeed_config(config, num_processes)
    zero = engine["zero_optimization"] if engine else {"stage": 0}
    stage = zero["stage"]
    layers, interval = transformer.config.num_layers, config.gradient_checkpointing
    checkpointed = 0 if not interval else -(-layers // interval)
    if engine and half:
        sizes = {"weights": 2 * parameters, "gradients": 2 * trainable, "optimizer": 12 * trainable}
    else:
        copied = trainable + frozen * (layers - checkpointed + bool(interval)) // layers
        sizes = {
            "weights": 4 * (trainable + frozen) + (2 * copied if half else 0),
            "gradients": 4 * trainable,
            "optimizer": {"adamw": 8, "adamw8bit": 2, "muon": 4}[config.optimizer] * trainable,
        }
    if config.quantization:
        # Module.to, since that of diffusers warns of float32 parts that this model does not have.
        cast = torch.nn.Module.to(copy.deepcopy(transformer), getattr(torch, PRECISIONS[config.precision]))
        sizes["weights"] = quantized_bytes(cast, config.quantization) + (6 if half else 4) * trainable
    for name, first_stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        if stage >= first_stage:
            sizes[name] //= num_processes

    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    scale = 1 if half else 2
    own_tokens = sum(-(-length // config.sequence_parallel) for length in layout.text_lengths + layout.video_lengths)
    tokens = config.micro_batch_size * own_tokens
    block = 34 * tokens * width * scale
    activations = (layers - checkpointed) * block + (
        checkpointed * 2 * tokens * width * scale + block if interval else 0
    )
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        tokens=layout.length,
        own_tokens=own_tokens,
        **sizes,
        activations=activations,
        optimizer_device="main memory" if "offload_optimizer" in zero else "device",
        available=torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
    )
