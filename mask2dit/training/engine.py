"""Processes, device and precision of a run: one process or many, plain DDP or DeepSpeed, a GPU or the CPU.

With `sequence_parallel=n`, n neighbouring processes share their samples. For DDP and ZeRO, all processes are still data
parallel: the gradients that Ulysses leaves on them are right when averaged over all of them (`ShardedLayout.gather_video`).
accelerate's own sequence parallelism is of no use here, since it replaces the attention of transformers' models; nor are
DeepSpeed's groups for it, with which ZeRO would add up gradients instead, and DDP would not.

The training configuration is the only source of batch size, accumulation, clipping and precision. A DeepSpeed file sets how
ZeRO shards; if it sets those too, they must agree.
"""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from mask2dit.device import name_cpu_to_deepspeed
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
        # DeepSpeed counts a sample once for each process that shares it.
        "train_batch_size": config.batch_size * config.sequence_parallel,
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


def check_deepspeed() -> None:
    """Raises `ValueError` if DeepSpeed is not installed, or cannot run in this process."""
    if find_spec("deepspeed") is None:
        raise ValueError("deepspeed is not installed: pip install deepspeed, or set deepspeed=null")
    if "RANK" not in os.environ:
        raise ValueError("DeepSpeed runs in processes that torchrun starts: use scripts/train.sh, or deepspeed=null")


def accumulation_steps(config: TrainConfig, num_processes: int) -> int:
    """Forward passes per process and batch. Raises `ValueError` if the batch or the processes do not divide evenly."""
    shared_by = config.sequence_parallel
    num_groups, rest = divmod(num_processes, shared_by)
    if rest:
        raise ValueError(
            f"sequence_parallel={shared_by} does not divide the {num_processes} processes of this run: start a multiple of "
            f"{shared_by} processes"
        )
    at_once = config.micro_batch_size * num_groups
    steps, rest = divmod(config.batch_size, at_once)
    if rest or not steps:
        groups = f"{num_groups} groups of {shared_by} processes" if shared_by > 1 else f"{num_processes} processes"
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into {groups} with micro_batch_size="
            f"{config.micro_batch_size}: the nearest are {max(steps, 1) * at_once} and {(steps + 1) * at_once}"
        )
    return steps


@dataclass(frozen=True)
class SampleGroup:
    """The processes that share this process's samples: `sequence_parallel` neighbours, or this process alone."""

    number: int
    """Number of this group, from 0."""
    count: int
    """Number of groups."""
    process_group: dist.ProcessGroup | None = None
    """None: this process alone."""

    @property
    def is_first(self) -> bool:
        """True on the process that reads samples for its group."""
        return self.process_group is None or self.process_group.rank() == 0

    def from_first(self, value: Any) -> Any:
        """Returns the value that the first process of the group has. Its tensors have to be on the CPU."""
        if self.process_group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self.process_group, 0), group=self.process_group)
        return values[0]


def create_sample_group(config: TrainConfig, accelerator: Accelerator) -> SampleGroup:
    """Divides the processes of a run into groups that share samples. All processes call it."""
    rank, size, shared_by = accelerator.process_index, accelerator.num_processes, config.sequence_parallel
    if shared_by == 1:
        return SampleGroup(rank, size)
    group, _ = dist.new_subgroups(shared_by)
    return SampleGroup(rank // shared_by, size // shared_by, group)


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage; 0 without DeepSpeed."""
    given = deepspeed_config(config, world_size())
    return given["zero_optimization"]["stage"] if given else 0


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with gloo as its backend if there is no GPU."""
    handlers = []
    on_cpu = not torch.cuda.is_available()
    name_cpu_to_deepspeed()
    if on_cpu and "RANK" in os.environ:  # started by torchrun; without gloo, accelerate sees a single process on a CPU
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    given = deepspeed_config(config, world_size())
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
