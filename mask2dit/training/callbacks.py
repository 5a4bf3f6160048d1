"""Callbacks of a run: logging, checkpoints and validation."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from mask2dit.data.datasets import StoryDataset, build_dataset, collate
from mask2dit.data.order import Position
from mask2dit.files import append_line, keep_lines
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.story import decode_scene
from mask2dit.training.config import TrainConfig
from mask2dit.training.objective import diffusion_loss
from mask2dit.training.trainer import Callback, Trainer
from mask2dit.training.utilisation import peak_flops, training_flops
from mask2dit.video.writing import contact_sheet, write_image, write_video

logger = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves a checkpoint every `checkpoint_every` steps and after the last one."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.step % trainer.config.checkpoint_every == 0 or trainer.step == trainer.config.max_steps:
            trainer.save()


class Logging(Callback):
    """Writes a progress bar, `metrics.jsonl` and the configured trackers, from the main process."""

    def on_start(self, trainer: Trainer) -> None:
        config, accelerator = trainer.config, trainer.accelerator
        self._since = []
        self._peak = peak_flops(config.precision)
        if self._peak:
            self._flops = config.batch_size * training_flops(Mask2DiTPipeline.skeleton(config.model), config.data)
        accelerator.init_trackers("mask2dit")
        self._bar = tqdm(
            total=config.max_steps, initial=trainer.step, unit="step", disable=not accelerator.is_main_process
        )
        self._file = Path(config.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:
            # Steps after the checkpoint that this run resumes from are repeated, and logged again.
            keep_lines(self._file, lambda record: record["step"] <= trainer.step)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._since.append(metrics)
        self._bar.update()
        if trainer.step % trainer.config.log_every and trainer.step != trainer.config.max_steps:
            return
        values = {name: sum(step[name] for step in self._since) / len(self._since) for name in metrics}
        values["learning_rate"] = metrics["learning_rate"]
        if self._peak:
            values["utilisation"] = self._flops / (values["seconds"] * self._peak * trainer.accelerator.num_processes)
        if torch.cuda.is_available():
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._since = []
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        trainer.log(values)

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        if trainer.accelerator.is_main_process:
            trainer.accelerator.log(values, step=trainer.step)
            append_line(self._file, {"step": trainer.step, **values})

    def on_end(self, trainer: Trainer) -> None:
        self._bar.close()
        trainer.accelerator.end_training()


def load_validation_dataset(config: TrainConfig) -> StoryDataset | None:
    """The held-out clips of a run, read without a cache; None if it has none.

    Raises:
        FileNotFoundError, ValueError: as `build_dataset` raises them.
    """
    if not config.validation.every or not config.validation.manifest:
        return None
    data = replace(config.data, manifest=config.validation.manifest, cache=None)
    quarantine = Path(config.output_dir) / "validation_quarantine.jsonl"
    return build_dataset(data, quarantine, config.model, dtype="float32")


class Validation(Callback):
    """Measures the loss on held-out clips and generates stories, every `validation.every` steps.

    The loss is measured at fixed noise and timesteps, for the normal task and for extension from all scenes but the last, and
    logged per timestep. Stories have fixed prompts and a fixed seed. Samples and stories are split over processes.

    A checkpoint is saved first, since a process that is to stop may be ended before a validation is.

    Args:
        dataset: from `load_validation_dataset`.
    """

    def __init__(self, dataset: StoryDataset | None):
        self._dataset = dataset

    def between_steps(self, trainer: Trainer) -> None:
        config = trainer.config.validation
        if not config.every or trainer.step % config.every:
            return
        trainer.save()
        transformer = trainer.accelerator.unwrap_model(trainer.transformer)
        transformer.eval()
        if self._dataset:
            trainer.log(self._losses(trainer))
        if config.stories:
            self._draw(trainer, transformer)
        transformer.train()

    @torch.no_grad()
    def _losses(self, trainer: Trainer) -> dict[str, float]:
        config, accelerator, group = trainer.config.validation, trainer.accelerator, trainer.group
        num_scenes = trainer.config.data.num_scenes
        tasks = {"normal": None, "extension": torch.arange(num_scenes) == num_scenes - 1}
        count = min(config.num_samples, len(self._dataset))
        sums = torch.zeros(len(tasks), len(config.timesteps), device=accelerator.device)
        for first in range(0, count, group.count):
            # As in `_draw`: every process takes part in every forward pass, but each sample counts on one process only.
            position = min(first + group.number, count - 1)
            is_mine = group.is_first and position == first + group.number
            batch = collate([self._dataset[Position(0, position)]]) if group.is_first else None
            inputs = trainer.inputs(batch, text_dropout=0.0)
            for i, mask in enumerate(tasks.values()):
                for j, timestep in enumerate(config.timesteps):
                    arguments = {**inputs, "timesteps": torch.full((1,), timestep, device=accelerator.device)}
                    arguments |= {"scene_mask": mask, "context_timesteps": None}  # given scenes are clean, as in use
                    with accelerator.autocast():
                        loss = diffusion_loss(trainer.transformer, trainer.pipe.scheduler, **arguments)
                    sums[i, j] += loss if is_mine else 0
        losses = (accelerator.reduce(sums, "sum") / count).tolist()
        return {
            f"validation/{task}_{timestep}": losses[i][j]
            for i, task in enumerate(tasks)
            for j, timestep in enumerate(config.timesteps)
        }

    def _draw(self, trainer: Trainer, transformer: Mask2DiTTransformer3DModel) -> None:
        """Generates all scenes of each story at once, and its last scene from those before it, as mp4 and contact sheet."""
        config, accelerator, group = trainer.config.validation, trainer.accelerator, trainer.group
        folder = Path(trainer.config.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        pipe = Mask2DiTPipeline(**{**trainer.pipe.components, "transformer": transformer})
        pipe.set_progress_bar_config(disable=True)
        sheets = {}
        for first in range(0, len(config.stories), group.count):
            # A process without a story left generates the last one too, since ZeRO stage 3 needs all processes in every
            # forward pass.
            number = min(first + group.number, len(config.stories) - 1)
            is_mine = group.is_first and number == first + group.number
            try:
                story = self._story(trainer, pipe, config.stories[number])
            except (
                FloatingPointError
            ) as error:  # weights are checked by the loss; half precision may overflow in sampling
                logger.warning("story %d of validation.stories is not drawn: %s", number, error)
                story = {}
            for task, scenes in story.items():
                if is_mine:
                    path = folder / f"{trainer.step:08d}_{number:02d}_{task}.mp4"
                    write_video(path, np.concatenate(scenes), config.fps)
                    sheet = contact_sheet(scenes, config.stories[number])
                    write_image(path.with_suffix(".png"), sheet)
                    sheets[f"samples/{number:02d}_{task}"] = np.asarray(sheet)[None]
        if trainer.config.trackers:
            sheets = dict(gather_object(list(sheets.items())))
            for tracker in accelerator.trackers if accelerator.is_main_process else ():
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(sheets, step=trainer.step, **layout)

    @staticmethod
    def _story(trainer: Trainer, pipe: Mask2DiTPipeline, prompts: list[str]) -> dict[str, list[np.ndarray]]:
        """The scenes of a story for each task, uint8 (frames, H, W, 3) each."""
        config, data = trainer.config.validation, trainer.config.data
        size = {"height": data.height, "width": data.width, "num_frames": data.num_frames}
        latent_frames = pipe.video_shape(**size, num_scenes=len(prompts)).latent_frames

        def draw(context: torch.Tensor | None = None) -> torch.Tensor:
            with trainer.accelerator.autocast():
                return pipe(
                    prompts,
                    context_latents=context,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    generator=torch.Generator().manual_seed(config.seed),
                    output_type="latent",
                    **size,
                ).frames

        latents = {"fixed": draw()}
        if len(prompts) > 1:
            latents["extension"] = draw(latents["fixed"][:, : sum(latent_frames[:-1])])
        return {
            task: [decode_scene(pipe, scene) for scene in story.split(latent_frames, dim=1)]
            for task, story in latents.items()
        }
