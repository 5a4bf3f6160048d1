"""The training loop. Pre-training and fine-tuning differ only in the dataset and the conditional probability.

Every random choice of a step (samples, frame ranges, noise, timestep, task, dropped prompts) follows from the seed and the
sample's position alone, so that resuming a run or splitting it over processes does not change it.

Shapes: B samples of this process, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens
per scene, D text width.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from mask2dit.command import PREEMPTED, stop_noted
from mask2dit.data.datasets import StoryDataset, collate
from mask2dit.data.encoding import encode_caption, prepare_batch
from mask2dit.data.order import PositionSampler
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.randomness import generator_for
from mask2dit.training.checkpoints import save_checkpoint
from mask2dit.training.config import TrainConfig
from mask2dit.training.engine import SampleGroup
from mask2dit.training.objective import diffusion_loss, draw_timestep
from mask2dit.training.optimizer import create_optimizer, trained_parameters

logger = logging.getLogger(__name__)


class Callback:
    """Base of the actions around optimization steps. Every method is called on all processes."""

    def on_start(self, trainer: "Trainer") -> None:
        """Called before the first step."""

    def on_step(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Called after each step, when `trainer.step` steps are done."""

    def between_steps(self, trainer: "Trainer") -> None:
        """Called after `on_step`, unless the run is being stopped: for what may take longer than a cluster waits between its
        signal and the end of the process."""

    def on_log(self, trainer: "Trainer", values: dict[str, float]) -> None:
        """Called with measured values."""

    def on_end(self, trainer: "Trainer") -> None:
        """Called after the last step, or when the run is stopped."""


class Trainer:
    """Trains the transformer of a pipeline.

    Args:
        config: the configuration of the run.
        accelerator: from `create_accelerator`.
        pipe: the pipeline whose transformer is trained. VAE and text encoder are frozen, on the accelerator's device; with
            a cache and without validation, they are not needed.
        dataset: from `build_dataset`.
        callbacks: called in this order.
        start: number of steps done before, whose state `load` loads.
        group: the processes that share samples, from `create_sample_group`. None: none share any.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        pipe: Mask2DiTPipeline,
        dataset: StoryDataset,
        callbacks: Sequence[Callback] = (),
        start: int = 0,
        group: SampleGroup | None = None,
    ):
        self.config, self.accelerator, self.pipe = config, accelerator, pipe
        self.dataset, self.callbacks, self.step = dataset, callbacks, start
        self._saved = start  # the step of the newest checkpoint
        self.group = group or SampleGroup(accelerator.process_index, accelerator.num_processes)
        self.optimizer = create_optimizer(config, pipe.transformer)
        self.ema = EMAModel(trained_parameters(pipe.transformer), decay=config.ema_decay) if config.ema_decay else None
        data = config.data
        _, latent_frames, (_, *size) = pipe.video_shape(data.height, data.width, data.num_frames, data.num_scenes)
        self._tokens = pipe.transformer.scene_layout(*size, latent_frames).length * config.batch_size  # per step
        self.transformer, self.prepared_optimizer = accelerator.prepare(pipe.transformer, self.optimizer)
        if self.ema:
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)

    def train(self) -> int:
        """Trains until `max_steps`, or until a SIGTERM or SIGHUP. Returns the exit status: 0, or `PREEMPTED`."""
        batches = self._batches()
        for callback in self.callbacks:
            callback.on_start(self)
        status = 0
        with stop_noted() as stopped_by:
            while self.step < self.config.max_steps:
                metrics = self._step(batches)
                for callback in self.callbacks:
                    callback.on_step(self, metrics)
                if self._any(stopped_by() is not None):
                    self.save()
                    if self.accelerator.is_main_process:
                        logger.warning(
                            "stopped by %s after step %d, which is saved: resume=latest continues",
                            stopped_by() or "another process",
                            self.step,
                        )
                    status = PREEMPTED
                    break
                for callback in self.callbacks:
                    callback.between_steps(self)
            for callback in self.callbacks:
                callback.on_end(self)
        return status

    def log(self, values: dict[str, float]) -> None:
        """Passes measured values to the callbacks."""
        for callback in self.callbacks:
            callback.on_log(self, values)

    def save(self) -> None:
        """Saves a checkpoint of the steps taken, unless that is done already."""
        if self._saved != self.step:
            save_checkpoint(self.accelerator, self.config, self.step)
            self._saved = self.step

    def load(self, checkpoint: Path) -> None:
        """Loads the state that `save_checkpoint` saved."""
        self.accelerator.load_state(str(checkpoint))
        # accelerate counts forward passes, and takes a step at the multiples of the accumulation steps. A checkpoint lies
        # between two steps, whatever number of accumulation steps it was made with.
        self.accelerator.step = 0
        if self.ema:
            self.ema.to(self.accelerator.device)  # accelerate loads registered objects onto the CPU

    @torch.no_grad()
    def inputs(self, batch: dict | None, text_dropout: float) -> dict[str, torch.Tensor]:
        """The inputs of `diffusion_loss` from a batch. Each random draw is a function of the sample's position.

        Args:
            batch: from the dataset, on the first process of the sample group; None on the others.
            text_dropout: probability that all prompts of a sample are dropped.
        """
        config, device = self.config, self.accelerator.device
        latents, embeds, positions = self._encode(batch)
        num_scenes = config.data.num_scenes
        noise, timesteps, masks, context_timesteps = [], [], [], []
        for i, position in enumerate(positions):
            draw = generator_for(config.seed, *position, "objective")
            noise.append(torch.randn(latents.shape[1:], generator=draw))
            timesteps.append(draw_timestep(len(self.pipe.scheduler.alphas_cumprod), config.timestep_shift, draw))
            masks.append(scene_mask(num_scenes, config.conditional_probability, config.given_scenes, draw))
            if torch.rand(1, generator=draw) < text_dropout:
                embeds[i] = self._empty_text.repeat(num_scenes, 1)
            context_timesteps.append(torch.randint(config.context_noise + 1, (1,), generator=draw))
        return {
            "latents": latents.float(),
            "noise": torch.stack(noise).to(device),
            "prompt_embeds": embeds,
            "timesteps": torch.cat(timesteps).to(device),
            "scene_mask": torch.stack(masks).to(device),
            "context_timesteps": torch.cat(context_timesteps).to(device),
        }

    def _encode(self, batch: dict | None) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """Latents, text embeddings and positions of a batch. The first process of a sample group encodes it for the others,
        which may not even read the same clips, where a clip is replaced that fails to be read once."""
        device, encoded = self.accelerator.device, None
        if batch is not None:
            latents, embeds = prepare_batch(self.pipe, batch, self.config.seed, device)
            if self.group.process_group is None:
                return latents, embeds, list(zip(batch["epoch"], batch["position"]))
            encoded = latents.cpu(), embeds.cpu(), list(zip(batch["epoch"], batch["position"]))
        latents, embeds, positions = self.group.from_first(encoded)
        return latents.to(device), embeds.to(device), positions

    def _step(self, batches: Iterator[dict | None]) -> dict[str, float]:
        """Takes one optimization step over `batch_size` samples. Returns its metrics."""
        started = time.perf_counter()
        waited, losses, names = 0.0, [], []
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        for _ in range(self.accelerator.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            names += [name for sample in batch["names"] for name in sample] if batch else []
            with self.accelerator.accumulate(self.transformer):
                with self.accelerator.autocast():
                    inputs = self.inputs(batch, self.config.text_dropout)
                    loss = diffusion_loss(self.transformer, self.pipe.scheduler, **inputs, reduction="none")
                losses.append(self.accelerator.gather(loss.detach()))
                self._require_finite("loss", losses[-1], names)
                self.accelerator.backward(loss.mean())
                grad_norm = None
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(
                        self.transformer.parameters(), self.config.max_grad_norm
                    )
                    if self.config.precision != "fp16":  # in fp16, the loss scaler skips such steps and recovers
                        self._require_finite("gradient norm", torch.as_tensor(float(grad_norm or 0)), names)
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
        if self.ema:
            self.ema.step(trained_parameters(self.accelerator.unwrap_model(self.transformer)))
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "loss": torch.cat(losses).mean().item(),
            "grad_norm": float(grad_norm or 0),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_wait": waited / seconds,
        }

    def _batches(self) -> Iterator[dict | None]:
        """The batches of this process, from the next step to the last one; None for each that another one reads for it."""
        if not self.group.is_first:
            yield from repeat(None)
        sampler = PositionSampler(
            len(self.dataset),
            start=self.step * self.config.batch_size,
            stop=self.config.max_steps * self.config.batch_size,
            rank=self.group.number,
            world_size=self.group.count,
        )
        loader = DataLoader(
            self.dataset,
            batch_size=self.config.micro_batch_size,
            sampler=sampler,
            num_workers=self.config.num_workers,
            collate_fn=collate,
            persistent_workers=self.config.num_workers > 0,
        )
        try:
            yield from loader
        except (OSError, ValueError) as error:
            if "in DataLoader worker" not in str(error):
                raise
            # The message is the worker's traceback, which ends with the error.
            raise type(error)(str(error).splitlines()[-1].partition(": ")[2]) from error

    @cached_property
    def _empty_text(self) -> torch.Tensor:
        """The embedding of the empty prompt, (L, D). It is constant, since the text encoder is frozen."""
        if self.dataset.cache is not None:
            return self.dataset.cache.embeddings("").to(self.accelerator.device)
        with self.accelerator.autocast():  # as in training, wherever it is first requested
            return encode_caption(self.pipe, "")

    def _require_finite(self, what: str, values: torch.Tensor, names: list[str]) -> None:
        """Raises `FloatingPointError` on all processes if any value is not finite, naming the samples."""
        if values.isfinite().all():
            return
        names = sorted(set(gather_object(names)))
        raise FloatingPointError(
            f"the {what} of step {self.step + 1} is {values.tolist()}; its samples are {', '.join(names)}. The weights are "
            "those of the last step; lower learning_rate, or use precision=bf16 or fp32"
        )

    def _any(self, flag: bool) -> bool:
        """True if the flag is set on any process."""
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the step that follows `step` completed ones: a linear rise, constant, then a linear fall that
    reaches 0 one step after the last."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = min(1.0, (config.max_steps - step) / max(config.decay_steps, 1))
    return config.learning_rate * rise * fall


def scene_mask(num_scenes: int, probability: float, given: str, generator: torch.Generator) -> torch.Tensor:
    """The scenes to generate, (S,) bools: all scenes or, with this probability, those of an extension.

    Args:
        num_scenes: the number of scenes S.
        probability: the probability of an extension.
        given: "last": all but the last scene are given (published); "random": any proper, non-empty subset is given.
        generator: the source of randomness; advanced by the same amount whatever the result.
    """
    is_extension = torch.rand(1, generator=generator) < probability
    subset = int(torch.randint(1, 2**num_scenes - 1, (1,), generator=generator)) if num_scenes > 1 else 0
    if not is_extension:
        return torch.ones(num_scenes, dtype=torch.bool)
    if given == "last":
        return torch.arange(num_scenes) == num_scenes - 1
    return torch.tensor([bool(subset >> scene & 1) for scene in range(num_scenes)])
