"""A story on several processes that torchrun starts: the branches of guidance on different processes, Ulysses within each.

With `cfg=2` and `ulysses=n`, processes 0 … n-1 share the passes for the negative prompts, and n … 2n-1 those for the prompts.
All processes prepare the same inputs and take the same steps of the scheduler. They differ in what they decode, and only the
first one (`is_main`) reads and writes the store and the output.
"""

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mask2dit.models.parallel import apply_ulysses, check_degree
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.story import SceneStore, decode_scene


@dataclass(frozen=True)
class Processes:
    """The processes of a run and the place of this one among them; by default, it is the only one."""

    rank: int = 0
    size: int = 1
    guidance_group: dist.ProcessGroup | None = None
    """The processes with the other branch of guidance, one per branch; None: both branches on this process."""
    ulysses_group: dist.ProcessGroup | None = None
    """The processes that share a pass; None: this process alone."""

    @property
    def is_main(self) -> bool:
        """True on the process that writes."""
        return self.rank == 0

    def apply(self, pipe: Mask2DiTPipeline) -> None:
        """Divides the work of a pipeline over the processes."""
        if not self.is_main:
            pipe.set_progress_bar_config(disable=True)
        pipe.guidance_group = self.guidance_group
        apply_ulysses(pipe.transformer, self.ulysses_group)

    def from_main(self, value: Any) -> Any:
        """Returns the value that the first process has. Its tensors have to be on the CPU."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def decode(
        self, pipe: Mask2DiTPipeline, scenes: Sequence[torch.Tensor], device: torch.device
    ) -> list[np.ndarray | None]:
        """Decodes scenes, scaled latents (1, F, C, h, w) each, on all processes at once.

        Returns:
            The frames of each scene, uint8 (frames, H, W, 3), on the first process; None for each on the others.

        Raises:
            FloatingPointError: as `decode_scene`.
        """
        own = [decode_scene(pipe, scene, device) for scene in scenes[self.rank :: self.size]]
        if self.size == 1:
            return own
        by_rank = [[]] * self.size if self.is_main else None
        dist.gather_object(own, by_rank, dst=0)
        if by_rank is None:
            return [None] * len(scenes)
        return [by_rank[i % self.size][i // self.size] for i in range(len(scenes))]


ALONE = Processes()


class SharedStore(SceneStore):
    """A store of scenes that the first process reads and writes for all, since others may not see its files."""

    def __init__(self, folder: str | os.PathLike, identity: str, processes: Processes):
        super().__init__(folder, identity)
        self._processes = processes

    def load(self, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        return self._processes.from_main(super().load(key, shape) if self._processes.is_main else None)

    def save(self, key: str, latents: torch.Tensor) -> None:
        if self._processes.is_main:
            super().save(key, latents)


def check_processes(cfg: int, ulysses: int) -> None:
    """Checks the number of processes that torchrun started.

    Raises:
        ValueError: if it is not `cfg * ulysses`.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != cfg * ulysses:
        raise ValueError(
            f"parallel.cfg={cfg} and parallel.ulysses={ulysses} need {cfg * ulysses} processes, but there "
            f"{'is' if started == 1 else 'are'} {started}: start them by torchrun --nproc-per-node={cfg * ulysses}, or "
            f"set keys whose product is {started}"
        )


def check_parallel(cfg: int, ulysses: int, num_heads: int, guidance_scale: float, memory: str) -> None:
    """Raises `ValueError` if heads do not divide, there is no guidance to divide, or the memory mode gains nothing."""
    check_degree("parallel.ulysses", ulysses, num_heads)
    if cfg > 1 and guidance_scale <= 1:
        raise ValueError(
            f"parallel.cfg={cfg} divides the two branches of guidance, but guidance_scale={guidance_scale} has only one: "
            "use parallel.cfg=1"
        )
    if cfg * ulysses > 1 and memory == "sequential_offload":
        raise ValueError(
            "memory=sequential_offload copies all weights to each GPU layer by layer, which takes as long on several "
            "processes: use group_offload, or one process"
        )


def local_device(device: torch.device) -> torch.device:
    """Returns this process's own GPU if the device is a GPU and torchrun started several processes.

    Raises:
        ValueError: if the device names one GPU for all processes.
    """
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.index is not None:
        raise ValueError(f"device={device} is one GPU, but every process needs its own: use device=cuda or auto")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def start_processes(cfg: int, ulysses: int, device: torch.device) -> Generator[Processes]:
    """Connects the processes that torchrun started, and ends all of them if one fails.

    Only the first process that fails raises its error; the others, which fail for the same reason or because it has ended,
    exit without a message. If a process ended without any, one of the others raises the error.

    Raises:
        ValueError: as `check_processes`.
        ConnectionError: if another process has ended without a message.
    """
    check_processes(cfg, ulysses)
    if cfg * ulysses == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size
    )
    if rank > 0:  # what it would say is said once
        logging.getLogger("mask2dit").setLevel(logging.ERROR)
    try:
        mesh = dist.init_device_mesh(device.type, (cfg, ulysses), mesh_dim_names=("cfg", "ulysses"))
        yield Processes(
            rank=rank,
            size=size,
            guidance_group=mesh.get_group("cfg") if cfg > 1 else None,
            ulysses_group=mesh.get_group("ulysses") if ulysses > 1 else None,
        )
    except (Exception, SystemExit) as error:  # SystemExit: torchrun stops the processes that are left, by SIGTERM
        try:
            is_first = store.add("failed", 1) == 1
        except dist.DistError:  # its host has ended too
            is_first = False
        is_stopped = isinstance(error, SystemExit)
        if not is_first:
            raise SystemExit(error.code if is_stopped else 1) from error
        if is_stopped or lost_connection(error):
            raise ConnectionError(
                "another process of this run was killed, perhaps for its memory, or all were stopped: there is no video, but "
                "the next run reuses finished scenes"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def lost_connection(error: BaseException) -> bool:
    """Returns True for an error of a collective operation whose other processes have ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
