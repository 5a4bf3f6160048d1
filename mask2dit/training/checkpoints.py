"""Checkpoints of a run: written atomically, and loaded only from the run's own folder.

A checkpoint is written to a temporary folder and renamed when it is complete, so that a process killed at any moment leaves
the last good one. The engines write pickles into it, which is why only this run's folder is read.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mask2dit.files import partial_folder, read_json, remove_partial_folders, replace_folder, write_errors, write_text
from mask2dit.hashing import fingerprint
from mask2dit.models.hub import recorded
from mask2dit.provenance import describe_changes, software
from mask2dit.training.config import TrainConfig
from mask2dit.training.engine import world_size

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
REPLACED = "replaced-"  # before the name of a checkpoint that another continuation of the run replaces
STATE = "run.json"
ADDITIONS = "lora.safetensors"
# Keys that may differ between a run and its continuation: where it runs and its data lie, how far, how it ends, and its
# reports. A manifest that has other contents is noticed by its fingerprint.
FREE_KEYS = ("resume", "max_steps", "decay_steps", "num_workers", "checkpoint_every", "keep_checkpoints", "log_every",
             "trackers", "validation", "output_dir", "dry_run", "micro_batch_size", "sequence_parallel",
             "copy_frozen", "data.manifest", "data.data_root", "data.cache", "data.max_retries",
             "data.max_quarantined_share")  # fmt: skip


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(config: TrainConfig) -> tuple[Path, int] | None:
    """The checkpoint that a run resumes from, and its step; None for a new run. Warns of harmless differences.

    Raises:
        FileNotFoundError: if the checkpoint to resume does not exist.
        FileExistsError: if a new run would write into the folder of another run.
        ValueError: if the checkpoint is damaged, naming the newest intact one; was made with another configuration, naming
            the keys that differ; was made by another number of DeepSpeed processes; or is beyond `max_steps`.
    """
    existing = checkpoints(config.output_dir)
    if config.resume is None:
        if existing:
            raise FileExistsError(
                f"{config.output_dir!r} holds another run ({existing[-1].name}): use resume=latest or another output_dir"
            )
        return None
    if config.resume == "auto" and not existing:
        _report(logging.INFO, "resume=auto: there is no checkpoint in %s, so this is a new run", config.output_dir)
        return None
    if config.resume in ("latest", "auto"):
        if not existing:
            raise FileNotFoundError(
                f"there is no checkpoint in {config.output_dir!r} to resume: leave resume out, or set resume=auto"
            )
        path = existing[-1]
    else:
        path = Path(config.resume)
        if path.resolve() not in [checkpoint.resolve() for checkpoint in existing]:
            known = ", ".join(checkpoint.name for checkpoint in existing) or "none"
            raise FileNotFoundError(
                f"{config.resume!r} is not a checkpoint of {config.output_dir!r}, whose checkpoints are: {known}"
            )
    if (reason := fault(path)) is not None:
        raise damaged(path, reason, config)
    state = read_json(path / STATE, "resume another checkpoint")
    defaults = _comparable(dataclasses.asdict(TrainConfig()))  # for keys that are newer than the checkpoint
    before = defaults | _comparable(state["config"])
    if changes := describe_changes(before, _comparable(recorded(config))):
        raise ValueError(f"{str(path)!r} was made with another configuration: {changes}")
    if config.max_steps < state["step"]:
        raise ValueError(
            f"max_steps={config.max_steps} is below step {state['step']} of {str(path)!r}: raise max_steps, or resume an "
            "earlier checkpoint"
        )
    _compare_surroundings(config, path, state)
    return path, state["step"]


def _compare_surroundings(config: TrainConfig, path: Path, state: dict) -> None:
    """Warns of other changes since a checkpoint. Raises `ValueError` if a run cannot continue with them."""
    then, now = state.get("num_processes"), world_size()
    if then not in (None, now):
        if config.deepspeed:
            raise ValueError(
                f"{str(path)!r} was saved by {then} processes, over which DeepSpeed splits the optimizer's state, but there "
                f"are {now} now: start {then} processes"
            )
        _report(
            logging.WARNING,
            "%s was saved by %s processes and is resumed by %s: the steps stay the same up to rounding",
            path,
            then,
            now,
        )
    if state.get("manifest") not in (None, fingerprint(config.data.manifest)):
        _report(
            logging.WARNING,
            "data.manifest=%s has changed since %s was saved: from here on, other samples are drawn than before the change",
            config.data.manifest,
            path,
        )


def _report(level: int, message: str, *args: object) -> None:
    """Logs a message on the first process."""
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, message, *args)


def check_agreement(found: tuple[Path, int] | None, config: TrainConfig) -> None:
    """Raises `OSError` on all processes if their `find_checkpoint` has found different checkpoints."""
    names = [found[0].name if found else "no checkpoint"]
    if len(set(names := gather_object(names))) > 1:
        of_processes = ", ".join(f"{name} (process {rank})" for rank, name in enumerate(names))
        raise OSError(
            f"the processes see different checkpoints in {config.output_dir!r}: {of_processes}. Put output_dir on storage "
            "that all nodes share, or start again once it shows all nodes the same"
        )


def fault(checkpoint: Path) -> str | None:
    """The reason that a checkpoint cannot be loaded, by the sizes and headers of its files; None if there is none."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        _, _, sizes = state["step"], state["config"], state.get("files")
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{STATE}: {error!r}"
    if sizes is None:  # from a version that did not record them
        sizes = _sizes(checkpoint)
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                return f"{name}: {error}"
        elif file.suffix in (".bin", ".pt", ".pkl") and not is_zipfile(file):  # torch.save writes zip files
            return f"{name} is not a file of torch.save"
    return None


def damaged(checkpoint: Path, reason: str, config: TrainConfig) -> ValueError:
    """The error for a checkpoint that cannot be loaded."""
    whole = [path for path in checkpoints(config.output_dir) if path.name != checkpoint.name and fault(path) is None]
    if whole:
        remedy = f"resume={whole[-1]} resumes from the newest complete one and replaces the damaged ones"
    else:
        remedy = "no other one is whole, so start a new run in another output_dir"
    return ValueError(f"the checkpoint {str(checkpoint)!r} is damaged ({reason}): {remedy}")


@contextmanager
def load_errors(checkpoint: Path, config: TrainConfig) -> Generator[None]:
    """Converts the errors by which libraries report a damaged file to the error of `damaged`."""
    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise damaged(checkpoint, str(error).split("\n")[0], config) from error


def remove_leftovers(config: TrainConfig) -> None:
    """Removes the damaged checkpoints of a run, and the partial folders of killed processes."""
    remove_partial_folders(config.output_dir)
    for path in checkpoints(config.output_dir):
        if (reason := fault(path)) is not None:
            logger.warning("removed %s, which is damaged (%s)", path, reason)
            shutil.rmtree(path)


def set_aside_later(config: TrainConfig, step: int) -> None:
    """Renames the checkpoints beyond the step that a run resumes from. They belong to a continuation that the run leaves, and
    under their names, `latest` would return to it. An earlier one that was set aside at the same step is removed, so that a
    job that is started over and over does not fill the disk."""
    for path in checkpoints(config.output_dir):
        if int(path.name.removeprefix(PREFIX)) > step:
            aside = path.with_name(REPLACED + path.name)
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            logger.warning(
                "renamed %s, which is beyond step %d, to %s: remove it to save space", path, step, aside.name
            )


def save_additions_alone(accelerator: Accelerator) -> None:
    """Makes the checkpoints of an accelerator hold LoRA's additions in place of all weights, of which the frozen ones are
    those of the run's `model`."""

    def save(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # what is left in it, accelerate saves
        if accelerator.is_main_process:
            transformer = accelerator.unwrap_model(models[0])
            save_file(get_peft_model_state_dict(transformer), Path(folder) / ADDITIONS, metadata={"format": "pt"})

    def load(models: list[torch.nn.Module], folder: str) -> None:
        transformer = accelerator.unwrap_model(models.pop())  # what is left in it, accelerate loads
        set_peft_model_state_dict(transformer, load_file(Path(folder) / ADDITIONS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Saves model, optimizer and random states after a step, on all processes, and removes the oldest checkpoints beyond the
    limit.

    Raises:
        OSError: if the disk is full; earlier checkpoints are kept.
    """
    final = Path(config.output_dir) / f"{PREFIX}{step:08d}"
    partial = partial_folder(final)
    try:
        with write_errors(final):
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                state = {"step": step, **run_record(config), "files": _sizes(partial)}
                write_text(partial / STATE, json.dumps(state, indent=2))
                replace_folder(partial, final)
                for old in checkpoints(config.output_dir)[: -config.keep_checkpoints]:
                    shutil.rmtree(old)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The size in bytes of each file of a checkpoint, by its path in the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def run_record(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration, the number of processes, the manifest's fingerprint and the software of a run."""
    return {
        "config": recorded(config),
        "num_processes": world_size(),
        "manifest": fingerprint(config.data.manifest),
        **software(),
    }


def _comparable(config: dict) -> dict[str, Any]:
    """The settings that must stay the same for a resumed run to repeat its steps, with nested keys as `a.b`."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if not {key, key.partition(".")[0]} & set(FREE_KEYS)}
