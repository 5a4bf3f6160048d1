"""Processes, device and precision of a run: one process or many, plain DDP or DeepSpeed, a GPU or the CPU.

The training configuration is the only source of batch size, accumulation, clipping and precision. A DeepSpeed file sets how
ZeRO shards; if it sets those too, they must agree.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from mask2dit.training.config import TrainConfig

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def world_size() -> int:
    """The number of processes of this run, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed_config(config: TrainConfig, num_processes: int) -> dict[str, Any] | None:
    """The configuration for DeepSpeed: the file of `config.deepspeed`, completed from the training configuration.

    Returns:
        None without DeepSpeed.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a JSON object, has no ZeRO stage, or contradicts the training configuration.
    """
    if config.deepspeed is None:
        return None
    path = Path(config.deepspeed)
    if not path.is_file():
        raise FileNotFoundError(f"there is no DeepSpeed configuration {str(path)!r}")
    try:
        given = json.loads(path.read_text())
        stage = given["zero_optimization"]["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} has to be a JSON object with a stage in zero_optimization ({error!r})"
        ) from error
    if stage not in (1, 2, 3):
        raise ValueError(f"{str(path)!r}: the ZeRO stage has to be 1, 2 or 3, but is {stage!r}")
    required = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, num_processes),
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }
    for key, value in required.items():
        stated = given.get(key, value)
        stated = {"enabled": stated.get("enabled", False)} if isinstance(value, dict) else stated
        if stated not in (value, "auto"):
            raise ValueError(
                f"{str(path)!r} says {key}={json.dumps(stated)}, but the training configuration makes it "
                f"{json.dumps(value)}: remove it from the file"
            )
        given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    return given


def accumulation_steps(config: TrainConfig, num_processes: int) -> int:
    """Forward passes per process and batch. Raises `ValueError` if the batch does not divide evenly."""
    at_once = config.micro_batch_size * num_processes
    steps, rest = divmod(config.batch_size, at_once)
    if rest or not steps:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into {num_processes} processes with micro_batch_size="
            f"{config.micro_batch_size}: the nearest are {max(steps, 1) * at_once} and {(steps + 1) * at_once}"
        )
    return steps


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage; 0 without DeepSpeed."""
    given = deepspeed_config(config, world_size())
    return given["zero_optimization"]["stage"] if given else 0


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with gloo as its backend if there is no GPU."""
    handlers = []
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # Without these, accelerate sees a single process on a CPU, and DeepSpeed looks for a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "RANK" in os.environ:  # started by torchrun
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    given = deepspeed_config(config, world_size())
    if given and "RANK" not in os.environ:
        raise ValueError("DeepSpeed runs in processes that torchrun starts: use scripts/train.sh, or deepspeed=null")
    if given and on_cpu:
        import deepspeed

        # An all-reduce for inference only. DeepSpeed would compile it at the start of every first run, which takes most of a
        # minute and a C++ compiler; a process killed meanwhile leaves a lock at which all later runs wait forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Accelerator(
        mixed_precision=MIXED_PRECISION[config.precision],
        gradient_accumulation_steps=accumulation_steps(config, world_size()),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=given) if given else None,
        kwargs_handlers=handlers,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        cpu=on_cpu and not given,  # with cpu=True, accelerate would ignore DeepSpeed
    )
