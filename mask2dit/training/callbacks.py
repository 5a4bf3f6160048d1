"""What a run does beside optimising: logging, checkpoints and validation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mask2dit.data.datasets import build_dataset, collate
from mask2dit.data.order import Position
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.training.checkpoints import save_checkpoint
from mask2dit.training.objective import diffusion_loss
from mask2dit.training.trainer import Callback, Trainer
from mask2dit.video.frames import to_uint8
from mask2dit.video.writing import contact_sheet, write_image, write_video


class Checkpoints(Callback):
    """Saves every `checkpoint_every` steps, and after the last one."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.step % trainer.config.checkpoint_every == 0 or trainer.step == trainer.config.max_steps:
            save_checkpoint(trainer.accelerator, trainer.config, trainer.step)


class Logging(Callback):
    """A progress bar, `metrics.jsonl`, and the trackers of the configuration, from the main process."""

    def on_start(self, trainer: Trainer) -> None:
        config, accelerator = trainer.config, trainer.accelerator
        self._since = []
        accelerator.init_trackers("mask2dit")
        self._bar = tqdm(
            total=config.max_steps, initial=trainer.step, unit="step", disable=not accelerator.is_main_process
        )
        self._file = Path(config.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process and self._file.is_file():
            # Steps after the checkpoint that this run goes on from are done, and logged, again.
            lines = [line for line in self._file.read_text().splitlines() if json.loads(line)["step"] <= trainer.step]
            self._file.write_text("".join(f"{line}\n" for line in lines))

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._since.append(metrics)
        self._bar.update()
        if trainer.step % trainer.config.log_every and trainer.step != trainer.config.max_steps:
            return
        values = {name: sum(step[name] for step in self._since) / len(self._since) for name in metrics}
        values["learning_rate"] = metrics["learning_rate"]
        if torch.cuda.is_available():
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._since = []
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        trainer.log(values)

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        if trainer.accelerator.is_main_process:
            trainer.accelerator.log(values, step=trainer.step)
            with self._file.open("a") as file:
                file.write(json.dumps({"step": trainer.step, **values}) + "\n")

    def on_end(self, trainer: Trainer) -> None:
        self._bar.close()
        trainer.accelerator.end_training()


class Validation(Callback):
    """Every `validation.every` steps: the loss on held-out clips, and a story drawn from fixed prompts and seed.

    The loss is taken at fixed noise and timesteps, for the normal task and for extension from all scenes but the last, and
    logged for each timestep. Samples are split over processes.
    """

    def on_start(self, trainer: Trainer) -> None:
        config = trainer.config.validation
        self._dataset = None
        if config.every and config.manifest:
            data = replace(trainer.config.data, manifest=config.manifest, cache=None)
            quarantine = Path(trainer.config.output_dir) / "validation_quarantine.jsonl"
            self._dataset = build_dataset(data, quarantine, trainer.config.model, dtype="float32")  # without a cache

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        config = trainer.config.validation
        if not config.every or trainer.step % config.every:
            return
        transformer = trainer.accelerator.unwrap_model(trainer.transformer)
        transformer.eval()
        if self._dataset:
            trainer.log(self._losses(trainer))
        if config.prompts:
            self._draw(trainer, transformer)
        transformer.train()

    @torch.no_grad()
    def _losses(self, trainer: Trainer) -> dict[str, float]:
        config, accelerator = trainer.config.validation, trainer.accelerator
        num_scenes = trainer.config.data.num_scenes
        tasks = {"normal": None, "extension": torch.arange(num_scenes) == num_scenes - 1}
        count = min(config.num_samples, len(self._dataset)) // accelerator.num_processes * accelerator.num_processes
        sums = torch.zeros(len(tasks), len(config.timesteps), device=accelerator.device)
        for position in range(accelerator.process_index, count, accelerator.num_processes):
            inputs = trainer.inputs(collate([self._dataset[Position(0, position)]]))
            for i, mask in enumerate(tasks.values()):
                for j, timestep in enumerate(config.timesteps):
                    arguments = {**inputs, "timesteps": torch.full((1,), timestep, device=accelerator.device)}
                    arguments["scene_mask"] = mask
                    with accelerator.autocast():
                        sums[i, j] += diffusion_loss(trainer.transformer, trainer.pipe.scheduler, **arguments)
        losses = (accelerator.reduce(sums, "sum") / max(count, 1)).tolist()
        return {
            f"validation/{task}_{timestep}": losses[i][j]
            for i, task in enumerate(tasks)
            for j, timestep in enumerate(config.timesteps)
        }

    def _draw(self, trainer: Trainer, transformer) -> None:
        """All scenes at once, and the last one from those before it, as mp4 and contact sheet."""
        config, data, accelerator = trainer.config.validation, trainer.config.data, trainer.accelerator
        folder = Path(trainer.config.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        pipe = Mask2DiTPipeline(**{**trainer.pipe.components, "transformer": transformer})
        pipe.set_progress_bar_config(disable=True)
        size = {"height": data.height, "width": data.width, "num_frames": data.num_frames}
        options = {
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "output_type": "latent",
        }
        frames, latent_frames, _ = pipe.check_size(**size, num_scenes=len(config.prompts))

        def draw(context=None):
            generator = torch.Generator().manual_seed(config.seed)
            with accelerator.autocast():
                return pipe(config.prompts, context_latents=context, generator=generator, **size, **options).frames

        latents = {"fixed": draw()}
        if len(frames) > 1:
            latents["extension"] = draw(latents["fixed"][:, : sum(latent_frames[:-1])])
        if not accelerator.is_main_process:
            return
        for name, story in latents.items():
            video = to_uint8(pipe.decode_latents(story, latent_frames)[0])
            path = folder / f"{trainer.step:08d}_{name}.mp4"
            write_video(path, video, config.fps)
            scenes = np.split(video, np.cumsum(frames)[:-1])
            write_image(path.with_suffix(".png"), contact_sheet(scenes, config.prompts))
