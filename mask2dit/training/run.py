"""A training run from its configuration: checks, models, the training loop and the export."""

import json
import logging
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import cast_training_params
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from mask2dit.config import check_between, missing_model
from mask2dit.data.datasets import StoryDataset, build_dataset
from mask2dit.data.encoding import load_encoders
from mask2dit.files import atomic_folder, check_writable, write_text
from mask2dit.models.attention import check_attention_backend
from mask2dit.models.hub import local_model
from mask2dit.models.loading import folder_variants
from mask2dit.models.lora import check_targets
from mask2dit.models.masks import cross_scene
from mask2dit.models.parallel import apply_ulysses, check_degree
from mask2dit.models.quantization import check_quantization
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.parallel import lost_connection
from mask2dit.training.callbacks import Checkpoints, Logging, Validation, load_validation_dataset
from mask2dit.training.checkpoints import (
    check_agreement,
    find_checkpoint,
    load_errors,
    remove_leftovers,
    run_record,
    save_additions_alone,
    set_aside_later,
)
from mask2dit.training.config import PRECISIONS, TrainConfig
from mask2dit.training.engine import (
    accumulation_steps,
    check_deepspeed,
    create_accelerator,
    create_sample_group,
    deepspeed_config,
    world_size,
    zero_stage,
)
from mask2dit.training.memory import estimate_memory
from mask2dit.training.optimizer import trained_parameters
from mask2dit.training.trainer import Callback, Trainer

logger = logging.getLogger(__name__)

FROZEN = ("vae", "text_encoder", "tokenizer", "scheduler")


def train(config: TrainConfig) -> int:
    """Runs a training configuration.

    Returns:
        The exit status: 0, or `command.PREEMPTED` after a SIGTERM or SIGHUP.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: if the configuration cannot be carried out; raised
            before weights are read.
        OSError: if a file cannot be written, or another process of the run has ended.
    """
    config = local_model(config, configs_only=config.dry_run)
    plan = plan_training(config)
    found = plan.checkpoint
    if config.dry_run:
        print(estimate_memory(config, plan.skeleton, world_size()))
        return 0
    set_seed(config.seed)  # for LoRA's initial weights; samples have their own generators
    # Before the accelerator: with ZeRO stage 3 active, transformers would split the frozen text encoder while loading it.
    pipe = load_pipeline(config, plan.skeleton)
    accelerator = create_accelerator(config)
    check_agreement(found, config)
    for part in (pipe.vae, pipe.text_encoder):
        if part is not None and part.device.type != "meta":
            part.to(accelerator.device)
    if config.lora.rank and config.deepspeed is None:
        save_additions_alone(accelerator)
    group = create_sample_group(config, accelerator)
    apply_ulysses(pipe.transformer, group.process_group)
    # Logging comes last, since it destroys the process group at the end.
    callbacks = [Checkpoints(), Validation(plan.validation_dataset), Export(), Logging()]
    trainer = Trainer(config, accelerator, pipe, plan.dataset, callbacks, start=found[1] if found else 0, group=group)
    if found:
        with load_errors(found[0], config):
            trainer.load(found[0])
        logger.info("resumed from %s", found[0])
    if accelerator.is_main_process:
        remove_leftovers(config)
        set_aside_later(config, trainer.step)
        write_text(Path(config.output_dir) / "run.json", json.dumps(run_record(config), indent=2))
    try:
        return trainer.train()
    except RuntimeError as error:
        if lost_connection(error):
            raise ConnectionError("another process of this run has ended, and its own message says why") from error
        raise


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The parts of a run that are built by its checks."""

    skeleton: Mask2DiTPipeline
    """The model without weights."""
    dataset: StoryDataset
    validation_dataset: StoryDataset | None
    checkpoint: tuple[Path, int] | None
    """The checkpoint that the run resumes from and its step, from `find_checkpoint`."""


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Checks everything that can be checked without reading weights.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: if a check fails, with the remedy.
    """
    if not Path(config.model).is_dir():
        raise FileNotFoundError(missing_model(config.model))
    if config.mask_variant is not None:
        cross_scene(config.mask_variant)
    accumulation_steps(config, world_size())
    deepspeed_config(config, world_size())
    if config.deepspeed and config.ema_decay:
        raise ValueError(
            f"ema_decay={config.ema_decay} averages whole float32 weights, which DeepSpeed splits or keeps out of sight: "
            "leave out deepspeed or ema_decay"
        )
    if config.lora.rank and zero_stage(config) == 3:
        raise ValueError("lora.rank cannot be used with ZeRO stage 3, which splits the frozen weights: use stage 2")
    if config.compile and zero_stage(config) == 3:
        raise ValueError(
            "compile=true cannot be used with ZeRO stage 3, which gathers weights block by block: use stage 2"
        )
    if config.optimizer != "adamw" and config.deepspeed:
        raise ValueError(
            f"optimizer={config.optimizer} cannot be used with deepspeed, which splits its state: use adamw"
        )
    if not config.dry_run:
        _check_machine(config)
    skeleton = Mask2DiTPipeline.skeleton(config.model, configs_only=config.dry_run, variant=config.variant)
    skeleton.video_shape(config.data.height, config.data.width, config.data.num_frames, config.data.num_scenes)
    if "quantization_config" in Mask2DiTTransformer3DModel.load_config(Path(config.model) / "transformer"):
        raise ValueError(
            f"the transformer of {config.model!r} was saved quantized, and training starts from plain weights: name the "
            "folder that it was made from, with quantization= to train LoRA's additions over quantized weights"
        )
    if config.lora.rank:
        check_targets(skeleton.transformer, config.lora.target_modules)
    check_degree("sequence_parallel", config.sequence_parallel, skeleton.transformer.config.num_attention_heads)
    # Not the cache in a dry run: comparing it with the model would read the model's weights.
    data = replace(config.data, cache=None) if config.dry_run else config.data
    quarantine = Path(config.output_dir) / "quarantine.jsonl"  # the run's list of clips that could not be read
    dataset = build_dataset(data, quarantine, config.model, PRECISIONS[config.precision], skeleton, config.variant)
    validation_dataset = load_validation_dataset(config)
    if config.validation.every:
        last = skeleton.scheduler.config.num_train_timesteps - 1
        for timestep in config.validation.timesteps:
            check_between("a timestep of validation.timesteps", timestep, 0, last)
        skeleton.check_steps(config.validation.num_inference_steps)
    return TrainingPlan(
        skeleton=skeleton,
        dataset=dataset,
        validation_dataset=validation_dataset,
        checkpoint=None if config.dry_run else find_checkpoint(config),
    )


def _check_machine(config: TrainConfig) -> None:
    """Checks what the machine of the run needs, and that of a dry run may lack.

    Raises:
        ValueError, PermissionError: if a check fails, with the remedy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.quantization is not None:
        check_quantization(config.quantization, device)
    if config.attention_backend is not None:
        check_attention_backend(config.attention_backend, device, is_training=True)
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision=fp16 needs a GPU: use bf16 or fp32")
    if config.deepspeed:
        check_deepspeed()
    if config.optimizer == "adamw8bit" and (find_spec("bitsandbytes") is None or device.type == "cpu"):
        raise ValueError("optimizer=adamw8bit needs a GPU and bitsandbytes (pip install bitsandbytes): use adamw")
    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise ValueError(
                f"trackers names {tracker}, which is not installed: pip install {tracker}, or leave it out"
            )
    check_writable(config.output_dir)


def load_pipeline(config: TrainConfig, skeleton: Mask2DiTPipeline) -> Mask2DiTPipeline:
    """Loads the weights into a skeleton, on the CPU: the transformer in float32, frozen parts in the run's precision."""
    pipe, dtype = skeleton, getattr(torch, PRECISIONS[config.precision])
    if config.data.cache is None or config.validation.every:
        pipe = load_encoders(config.model, dtype, torch.device("cpu"), skeleton, config.variant)
    transformer = Mask2DiTTransformer3DModel.from_pretrained(
        config.model,
        subfolder="transformer",
        mask_variant=config.mask_variant,
        variant=folder_variants(Path(config.model), config.variant)["transformer"],
        torch_dtype=dtype if config.quantization else torch.float32,
        quantization=config.quantization,
    )
    pipe.register_modules(transformer=transformer.train())
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        transformer.gradient_checkpointing_interval = config.gradient_checkpointing
    if config.attention_backend:
        transformer.set_attention_backend(config.attention_backend)
    if config.lora.rank:
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha or config.lora.rank,
                target_modules=config.lora.target_modules,
            )
        )
        cast_training_params(transformer, torch.float32)
    if config.quantization:
        # DDP would broadcast them, which torchao's tensors do not support. All processes have read the same ones.
        frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    if config.compile:
        # Compile separately for each shape. Otherwise a dynamic version, compiled when validation uses another shape, would
        # replace the first one, and a resumed run would not repeat the last bits.
        transformer.compile_repeated_blocks(dynamic=False)
    return pipe


class Export(Callback):
    """Writes `model/` at the end, a folder that `Mask2DiTPipeline.from_pretrained` opens; for LoRA, `lora/`."""

    def on_end(self, trainer: Trainer) -> None:
        if trainer.step == trainer.config.max_steps:
            export(trainer, Path(trainer.config.output_dir))


def export(trainer: Trainer, output_dir: Path) -> None:
    """Writes the trained transformer, or its moving average if there is one, with the frozen parts or links to them. For
    LoRA, writes the additions, with the settings that give loaders their scale."""
    accelerator, transformer = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.transformer)
    if trainer.ema:
        trainer.ema.store(trained_parameters(transformer))
        trainer.ema.copy_to(trained_parameters(transformer))
    if trainer.config.lora.rank:
        if accelerator.is_main_process:
            with atomic_folder(output_dir / "lora") as folder:
                Mask2DiTPipeline.save_lora_weights(
                    folder,
                    transformer_lora_layers=get_peft_model_state_dict(transformer),
                    transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
                )
    else:
        _export_model(trainer, output_dir)
    if trainer.ema:
        trainer.ema.restore(trained_parameters(transformer))
    accelerator.wait_for_everyone()


def _export_model(trainer: Trainer, output_dir: Path) -> None:
    accelerator, transformer = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.transformer)
    weights = accelerator.get_state_dict(trainer.transformer)
    if accelerator.is_main_process:
        with atomic_folder(output_dir / "model") as folder:
            transformer.save_config(folder / "transformer")
            weights = {name: weight.contiguous().cpu() for name, weight in weights.items()}
            save_file(weights, folder / "transformer" / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            for name in FROZEN:
                source = (Path(trainer.config.model) / name).resolve()
                if trainer.config.copy_frozen:
                    shutil.copytree(source, folder / name)
                else:
                    (folder / name).symlink_to(source, target_is_directory=True)
        logger.info("Wrote %s", output_dir / "model")
