"""Checkpoints of a run: whole or not there, and only its own.

A checkpoint is written to a folder of another name and renamed when it is complete, so that a process that is killed at any
moment leaves the last good one. What the engines write in it is pickled, which is why only this run's folder is read.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mask2dit.provenance import git_commit, versions
from mask2dit.training.config import TrainConfig
from mask2dit.video.writing import write_text

PREFIX = "checkpoint-"
STATE = "run.json"
# What may differ between a run and its continuation: where it runs, how far and how it ends, and what it reports.
FREE_KEYS = ("resume", "max_steps", "decay_steps", "num_workers", "checkpoint_every", "keep_checkpoints", "log_every",
             "trackers", "validation", "output_dir", "dry_run", "micro_batch_size")  # fmt: skip


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(config: TrainConfig) -> tuple[Path, int] | None:
    """The checkpoint that a run goes on from and its step, or None for a new run.

    Raises:
        FileNotFoundError: if the checkpoint to resume is not there.
        FileExistsError: if a new run would write into the folder of another.
        ValueError: if the checkpoint was made with another configuration, naming the keys that differ, or is another
            run's.
    """
    existing = checkpoints(config.output_dir)
    if config.resume is None:
        if existing:
            raise FileExistsError(
                f"{config.output_dir!r} holds another run ({existing[-1].name}): use resume=latest or another output_dir"
            )
        return None
    if config.resume == "latest":
        if not existing:
            raise FileNotFoundError(f"there is no checkpoint in {config.output_dir!r} to resume: leave resume out")
        path = existing[-1]
    else:
        path = Path(config.resume)
        if path.resolve() not in [checkpoint.resolve() for checkpoint in existing]:
            known = ", ".join(checkpoint.name for checkpoint in existing) or "none"
            raise FileNotFoundError(
                f"{config.resume!r} is no checkpoint of {config.output_dir!r}, whose checkpoints are: {known}"
            )
    state = json.loads((path / STATE).read_text())
    now = _comparable(dataclasses.asdict(config))
    before = {
        **_comparable(dataclasses.asdict(TrainConfig())),
        **_comparable(state["config"]),
    }  # which may lack newer keys
    differing = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if differing:
        changes = ", ".join(f"{key} ({before.get(key)!r} then, {now.get(key)!r} now)" for key in differing)
        raise ValueError(f"{str(path)!r} was made with another configuration: {changes}")
    return path, state["step"]


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Saves model, optimizer and random states after a step, on all processes, and removes checkpoints beyond the limit."""
    final = Path(config.output_dir) / f"{PREFIX}{step:08d}"
    if final.exists():
        return
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, **run_record(config)}
        write_text(partial / STATE, json.dumps(state, indent=2))
        partial.rename(final)
        for old in checkpoints(config.output_dir)[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def run_record(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration, and the versions and commit that a run was made with."""
    return {"config": dataclasses.asdict(config), "versions": versions(), "git_commit": git_commit()}


def _comparable(config: dict) -> dict[str, Any]:
    """What has to stay the same for steps to go on as if nothing had happened, with nested keys as `a.b`."""
    flat = {}
    for key, value in config.items():
        if key in FREE_KEYS:
            continue
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[key] = value
    return flat
