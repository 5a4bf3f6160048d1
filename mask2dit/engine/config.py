"""Where the work of a command runs, and which part of it. Imports nothing heavy, so that errors in it show at once."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from mask2dit.config import check_at_least, check_choice, check_positive, parse_shard

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")


@dataclass(kw_only=True)
class Resources:
    """What a worker of a stage takes; null: the stage's own value."""

    num_cpus: float | None = None
    """CPUs per worker, for engine=ray; null: 1."""
    num_gpus: float | None = None
    """GPUs per worker: a whole number, or a share such as 0.5 for two workers per GPU; null: 1 for stages that run a model,
    if there are GPUs."""
    batch: int | None = None
    """Items that a worker takes at a time, which are the items that a lost worker repeats."""

    def __post_init__(self):
        if self.num_cpus is not None:
            check_positive("num_cpus", self.num_cpus)
        if self.num_gpus is not None:
            check_at_least("num_gpus", self.num_gpus, 0)
            if self.num_gpus > 1 and self.num_gpus % 1:
                raise ValueError(f"num_gpus={self.num_gpus} has to be a whole number, or a share of one GPU")
        if self.batch is not None:
            check_at_least("batch", self.batch, 1)


@dataclass(kw_only=True)
class RayConfig:
    """The Ray cluster for engine=ray."""

    address: str | None = None
    """Address of a running cluster: auto (the one that this machine belongs to), HOST:6379 or ray://HOST:10001; null: a
    cluster of this machine alone is started for the run."""


@dataclass(kw_only=True)
class EngineConfig:
    """Where the work runs. Results do not depend on it."""

    # Where the work runs
    engine: str = "local"
    """Engine: local (processes on this machine) or ray (a Ray cluster)."""
    num_workers: int | None = None
    """Worker processes per stage; null: none with engine=local, where this process does the work, and as many as fit the
    cluster with engine=ray. Workers of stages that run a model are limited to the GPUs, if there are any."""
    resources: dict[str, Resources] = field(default_factory=dict)
    """Resources per worker by stage: resources.STAGE.num_cpus, resources.STAGE.num_gpus and resources.STAGE.batch. With
    engine=local they need num_workers."""
    ray: RayConfig = field(default_factory=RayConfig)
    shard: str | None = None
    """i/n: do the i-th of n parts of the work, counted from 0, so that n processes share it; 0/1: all of it, and what follows
    the parts. null: the part that torchrun, srun or a Slurm job array gives to this process, else 0/1."""

    def __post_init__(self):
        check_choice("engine", self.engine, ENGINES)
        if self.num_workers is not None:
            check_at_least("num_workers", self.num_workers, 1)
        if self.shard is not None:
            parse_shard(self.shard)
        if self.engine == "local":
            self._check_local()

    def _check_local(self) -> None:
        """Raises `ValueError` for settings that have no effect on this machine."""
        if self.ray.address is not None:
            raise ValueError(f"ray.address={self.ray.address} needs engine=ray")
        for stage, resources in self.resources.items():
            for name, value in asdict(resources).items():
                if value is None:
                    continue
                if self.num_workers is None:
                    raise ValueError(
                        f"resources.{stage}.{name}={value:g} is for workers, but this process does the work: set "
                        "num_workers, or engine=ray"
                    )
                if name == "num_cpus":
                    raise ValueError(
                        f"resources.{stage}.num_cpus={value:g} is for engine=ray: with engine=local, num_workers processes "
                        "share the CPUs"
                    )

    def check_resources(self, stages: Iterable[str]) -> None:
        """Raises `ValueError` if `resources` names something else than the stages that run on workers."""
        stages = list(stages)
        for name in self.resources:
            check_choice("a key of resources", name, stages)


def resolve_shard(config: EngineConfig, environment: Mapping[str, str] = os.environ) -> str:
    """The part of the work that this process does, as i/n.

    `config.shard` if it is set. Otherwise, with engine=local, the first of these that applies:

    - torchrun: `RANK` of `WORLD_SIZE`, where `TORCHELASTIC_RUN_ID` is set too;
    - srun with several tasks: `SLURM_PROCID` of `SLURM_STEP_NUM_TASKS`, which the batch script itself does not have;
    - a Slurm job array: the position of `SLURM_ARRAY_TASK_ID` between `SLURM_ARRAY_TASK_MIN` and `SLURM_ARRAY_TASK_MAX` in
      steps of `SLURM_ARRAY_TASK_STEP`, if `SLURM_ARRAY_TASK_COUNT` says that the array has no gaps.

    Raises:
        ValueError: if a job array has gaps, or has several processes per task, so that parts are ambiguous.
    """
    if config.shard is not None or config.engine == "ray":
        return config.shard or "0/1"
    found: dict[str, tuple[int, int]] = {}
    if "TORCHELASTIC_RUN_ID" in environment:
        found["torchrun's RANK"] = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    elif "SLURM_STEP_NUM_TASKS" in environment:
        found["SLURM_PROCID"] = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if "SLURM_ARRAY_TASK_ID" in environment:
        found["SLURM_ARRAY_TASK_ID"] = _of_job_array(environment)
    found = {source: (index, count) for source, (index, count) in found.items() if count > 1}
    if len(found) > 1:
        raise ValueError(
            f"both {' and '.join(found)} name a part of the work: set shard=i/n, or shard=0/1 for all of it"
        )
    for source, (index, count) in found.items():
        logger.warning(
            "This process does part %d/%d of the work, by %s; shard=0/1 does all of it", index, count, source
        )
        return f"{index}/{count}"
    return "0/1"


def _of_job_array(environment: Mapping[str, str]) -> tuple[int, int]:
    task, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    index = (task - first) // step
    if (last - first) // step + 1 != count or (task - first) % step:
        raise ValueError(
            f"the job array's {count} tasks from {first} to {last} have gaps, so its parts are not known: set shard=i/n, or "
            "shard=0/1 for all of the work"
        )
    return index, count
