"""The training loop of the small world's autoencoder and text encoder.

Muon and AdamW with a linear warm-up and a cosine decay, a moving average of the weights, and one checkpoint, written whole or
not at all. The samples of a step depend on the seed and the step alone, so that a stopped run continues with the same result.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from mask2dit.command import PREEMPTED, stop_noted
from mask2dit.config import check_at_least, check_choice
from mask2dit.files import append_line, atomic_path, check_writable, keep_lines
from mask2dit.provenance import describe_changes
from mask2dit.training.muon import Muon, spectral_scale

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
PRECISIONS = ("fp32", "bf16")
# Keys that may differ between a run and its continuation.
FREE_KEYS = ("output_dir", "device", "evaluate_every")


@dataclass(kw_only=True)
class LearningConfig:
    """Settings that both trainings share."""

    output_dir: str
    """Folder for the checkpoint, the metrics and the result of one run. A stopped run continues from its checkpoint."""
    max_steps: int
    """Number of optimization steps."""
    batch_size: int
    """Samples per step."""
    matrix_learning_rate: float = 0.03
    """Peak learning rate of Muon, which trains matrices and convolutions. It rises linearly from 0 over `warmup_steps`, then
    decays to 0 along a cosine."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW, which trains everything else, with the same schedule."""
    warmup_steps: int = 100
    """Steps over which the learning rates rise linearly from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is evaluated and saved."""
    precision: str = "bf16"
    """Precision: fp32 or bf16 (autocast)."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    seed: int = 0
    """Seed of the weights and of the samples."""
    evaluate_every: int = 500
    """Steps between evaluations, each of which saves a checkpoint too."""

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "evaluate_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("matrix_learning_rate", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be positive")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} cannot be negative")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} has to be between 0 and 1")
        check_choice("precision", self.precision, PRECISIONS)


def learn(
    config: LearningConfig,
    model: nn.Module,
    losses: Callable[[int], dict[str, torch.Tensor]],
    evaluate: Callable[[int], dict[str, float]],
) -> int:
    """Trains a model until `max_steps` or a SIGTERM, starting from the checkpoint in `output_dir` if there is one.

    Args:
        config: settings of the run.
        model: trained in place, on its current device; ends with the averaged weights.
        losses: gives the scalars of step i, of which "loss" is minimised. They may depend on the step alone.
        evaluate: measures the model, with the averaged weights in place, after the given number of steps.

    Returns:
        0, or `command.PREEMPTED` after a SIGTERM.

    Raises:
        ValueError: if the checkpoint is damaged or has another configuration, naming the differences.
        FloatingPointError: if the loss is not finite.
        OSError: if a file cannot be written.
    """
    folder = Path(config.output_dir)
    check_writable(folder)
    device = next(model.parameters()).device
    matrices, rest = split_parameters(model)
    muon = Muon(matrices, lr=config.matrix_learning_rate, scale=spectral_scale)
    adamw = torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=config.weight_decay)
    average = EMAModel(model.parameters(), decay=config.ema_decay)
    parts = {"model": model, "muon": muon, "adamw": adamw, "average": average}
    step = _load(config, parts)
    # Steps after the checkpoint are run and measured again.
    keep_lines(folder / METRICS, lambda record: record["step"] <= step)

    status = 0
    since: list[dict[str, float]] = []
    with stop_noted() as stopped_by, tqdm(total=config.max_steps, initial=step, unit="step") as bar:
        while step < config.max_steps and not status:
            for optimizer, highest in ((muon, config.matrix_learning_rate), (adamw, config.learning_rate)):
                for group in optimizer.param_groups:
                    group["lr"] = highest * schedule(config, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                values = losses(step)
            if not values["loss"].isfinite():
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {values['loss'].item()}: lower learning_rate"
                )
            values["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
            average.step(model.parameters())
            step += 1
            since.append({name: value.item() for name, value in values.items()})
            bar.update()

            if step % config.evaluate_every == 0 or step == config.max_steps:
                average.store(model.parameters())
                average.copy_to(model.parameters())
                model.eval()
                measured = {name: sum(one[name] for one in since) / len(since) for name in since[0]}
                with torch.no_grad():
                    measured |= evaluate(step)
                model.train()
                average.restore(model.parameters())
                bar.set_postfix({name: f"{value:.4g}" for name, value in measured.items()})
                append_line(folder / METRICS, {"step": step, **measured})
                since = []
                _save(config, parts, step)
            elif stopped_by():
                _save(config, parts, step)
                logger.warning("stopped by %s after step %d, which is saved", stopped_by(), step)
                status = PREEMPTED
    average.copy_to(model.parameters())
    model.eval()
    return status


def schedule(config: LearningConfig, step: int) -> float:
    """The share of the peak learning rate after `step` completed steps: a linear warm-up, then a cosine decay to 0."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = max(0, step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return rise * (1 + math.cos(math.pi * progress)) / 2


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of linear layers and convolutions, which Muon trains, and all other parameters.

    Layers with fewer than 8 outputs, such as the three colour channels, are left to AdamW.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    matrices = {id(layer.weight): layer.weight for layer in layers if len(layer.weight) >= 8}
    return list(matrices.values()), [weight for weight in model.parameters() if id(weight) not in matrices]


def _load(config: LearningConfig, parts: dict) -> int:
    """Loads the checkpoint if there is one. Returns the number of completed steps."""
    path = Path(config.output_dir) / CHECKPOINT
    if not path.is_file():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and the run starts anew"
        ) from error
    if changes := describe_changes(checkpoint["config"], dataclasses.asdict(config), ignore=FREE_KEYS):
        raise ValueError(
            f"{str(path)!r} was made with another configuration: {changes}; use another output_dir, or remove it"
        )
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    parts["average"].to(next(parts["model"].parameters()).device)
    return checkpoint["step"]


def _save(config: LearningConfig, parts: dict, step: int) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(Path(config.output_dir) / CHECKPOINT) as temporary:
        torch.save({"step": step, "config": dataclasses.asdict(config), **states}, temporary)
