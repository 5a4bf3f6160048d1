import errno
import json
import logging
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mask2dit import Mask2DiTPipeline
from mask2dit.training import checkpoints
from mask2dit.training.checkpoints import find_checkpoint, run_record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"
# What libraries raise on a full disk.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


def raises(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def write_checkpoint(config, step, **changes):
    """A checkpoint of tiny files."""
    folder = Path(config.output_dir) / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(9)}, folder / "model.safetensors")
    torch.save({"a": torch.zeros(9)}, folder / "optimizer.bin")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    record = {"step": step, **run_record(config), "files": sizes, **changes}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def overwrite(name):
    return lambda folder: (folder / name).write_bytes(b"\x00" * (folder / name).stat().st_size)


DAMAGE = {
    "weights cut short": (cut("model.safetensors"), "model.safetensors"),
    "optimizer cut short": (cut("optimizer.bin"), "optimizer.bin"),
    "an empty file": (lambda folder: (folder / "optimizer.bin").write_bytes(b""), "optimizer.bin"),
    "a file that is gone": (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin"),
    "other weights": (overwrite("model.safetensors"), "model.safetensors"),
    "another optimizer": (overwrite("optimizer.bin"), "optimizer.bin"),
    "no record": (lambda folder: (folder / "run.json").unlink(), "run.json"),
    "a record cut short": (cut("run.json"), "run.json"),
    "a record of something else": (lambda folder: (folder / "run.json").write_text("[]"), "run.json"),
}


@pytest.mark.parametrize("damage, name", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_newest_one_that_is_whole(config, damage, name):
    resumed = config(resume="latest", max_steps=100)
    for step in (10, 20, 30, 40):
        damaged = write_checkpoint(resumed, step)
        if step > 20:
            damage(damaged)
    with pytest.raises(ValueError, match=rf"checkpoint-00000040.*{name}.*resume=\S+checkpoint-00000020 ") as error:
        find_checkpoint(resumed)
    assert "\n" not in str(error.value)
    for step in (10, 20):
        damage(Path(resumed.output_dir) / f"checkpoint-{step:08d}")
    with pytest.raises(ValueError, match=rf"checkpoint-00000040.*{name}.*another output_dir"):
        find_checkpoint(resumed)


def test_a_checkpoint_of_a_version_that_noted_no_sizes_is_whole_until_its_files_tell_otherwise(config):
    resumed = config(resume="latest", max_steps=100)
    folder = write_checkpoint(resumed, 10)
    record = json.loads((folder / "run.json").read_text())
    for key in ("files", "num_processes", "manifest"):
        del record[key]
    (folder / "run.json").write_text(json.dumps(record))
    assert find_checkpoint(resumed) == (folder, 10)
    cut("model.safetensors")(folder)
    with pytest.raises(ValueError, match=r"checkpoint-00000010.*model\.safetensors"):
        find_checkpoint(resumed)


def test_going_on_from_a_checkpoint_that_is_whole_replaces_damaged_ones(config, run, metrics):
    whole = config(checkpoint_every=1)
    assert run(whole) == 0
    expected = load_file(Path(whole.output_dir) / WEIGHTS)
    folder = Path(whole.output_dir)
    for step in (3, 4):
        overwrite("optimizer.bin")(folder / f"checkpoint-{step:08d}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as by a process that was killed meanwhile
    with pytest.raises(ValueError, match=r"checkpoint-00000004.*checkpoint-00000002"):
        run(replace(whole, resume="latest"))
    assert run(replace(whole, resume=str(folder / "checkpoint-00000002"), max_steps=3)) == 0
    assert [path.name[-1] for path in checkpoints.checkpoints(folder)] == ["2", "3"]
    assert run(replace(whole, resume="latest")) == 0
    assert all(checkpoints.fault(path) is None for path in checkpoints.checkpoints(folder))
    found = load_file(folder / WEIGHTS)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3, 4]


def test_resuming_an_earlier_checkpoint_sets_the_later_ones_aside(config, run, monkeypatch):
    whole = config(checkpoint_every=1, max_steps=2)
    run(whole)
    folder = Path(whole.output_dir)
    earlier, later = checkpoints.checkpoints(folder)
    weights = load_file(later / "model.safetensors")
    replayed = replace(whole, resume=str(earlier), max_steps=3)
    with monkeypatch.context() as patched:
        patched.setattr("mask2dit.training.trainer.Trainer._step", raises(ConnectionError("lost")))
        for _ in range(2):  # also when the job is started again
            with pytest.raises(ConnectionError):
                run(replayed)
            assert checkpoints.checkpoints(folder) == [earlier]
            shutil.copytree(folder / f"replaced-{later.name}", later)
    run(replayed)
    assert [path.name[-1] for path in checkpoints.checkpoints(folder)] == ["1", "2", "3"]
    kept = load_file(folder / f"replaced-{later.name}/model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())


def test_damage_that_only_loading_finds_is_named(config, run):
    whole = config(checkpoint_every=1, max_steps=2)
    run(whole)
    file = Path(whole.output_dir) / "checkpoint-00000002/optimizer.bin"
    content = bytearray(file.read_bytes())
    content[100:10_000] = bytes(9_900)  # in the middle of its first entry
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint-00000002.*damaged.*checkpoint-00000001 "):
        run(replace(whole, resume="latest", max_steps=3))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_disk_that_is_full_while_saving_leaves_what_was_there_and_the_run_goes_on_later(
    config, run, monkeypatch, error
):
    run(config(max_steps=2))
    with monkeypatch.context() as patched:
        patched.setattr("accelerate.accelerator.save_accelerator_state", raises(error))
        with pytest.raises(OSError, match=r"cannot write \S+checkpoint-00000004 .*make room") as caught:
            run(config(resume="latest"))
    assert "\n" not in str(caught.value)
    folder = Path(config().output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-00000002", "metrics.jsonl", "model", "run.json"}
    assert run(config(resume="latest")) == 0


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_disk_that_is_full_while_exporting_needs_no_step_again(config, run, monkeypatch, error):
    short = config(max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr("mask2dit.training.run.save_file", raises(error))
        with pytest.raises(OSError, match=r"cannot write \S+model .*make room"):
            run(short)
    folder = Path(short.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-00000001", "metrics.jsonl", "run.json"}
    monkeypatch.setattr("mask2dit.training.trainer.Trainer._step", raises(AssertionError("a step was taken")))
    assert run(replace(short, resume="latest")) == 0
    assert (folder / WEIGHTS).is_file()


def test_auto_takes_the_newest_checkpoint_or_starts_a_new_run(config, caplog):
    caplog.set_level(logging.INFO, "mask2dit")
    automatic = config(resume="auto", max_steps=100)
    assert find_checkpoint(automatic) is None
    assert "new run" in caplog.text and automatic.output_dir in caplog.text
    write_checkpoint(automatic, 10)
    newest = write_checkpoint(automatic, 20)
    assert find_checkpoint(automatic) == (newest, 20)


def test_max_steps_below_the_checkpoint_is_refused(config):
    write_checkpoint(config(), 10)
    with pytest.raises(ValueError, match=r"max_steps=9 is below step 10 of \S+checkpoint-00000010"):
        find_checkpoint(config(resume="latest", max_steps=9))
    assert find_checkpoint(config(resume="latest", max_steps=10))[1] == 10


def test_a_changed_manifest_is_told_before_anything_is_loaded(config, clips, tmp_path, caplog):
    manifest = clips / "other.csv"
    shutil.copy(clips / "pretrain.csv", manifest)
    changed = config(resume="latest", max_steps=10, data__manifest=str(manifest))
    write_checkpoint(changed, 10)
    find_checkpoint(changed)
    assert not caplog.records
    manifest.write_text(manifest.read_text().replace("clip 3", "another caption"))
    find_checkpoint(changed)
    manifest.unlink()
    (record,) = caplog.records
    assert "other.csv has changed since" in record.getMessage()


def test_a_run_is_resumed_after_its_data_has_moved(config, clips, tmp_path, caplog):
    write_checkpoint(config(data__num_windows=2), 2)
    manifest = shutil.copy(clips / "pretrain.csv", tmp_path / "moved.csv")
    moved = {"data__manifest": str(manifest), "data__data_root": str(clips), "data__cache": str(tmp_path / "cache")}
    assert find_checkpoint(config(resume="latest", data__num_windows=2, data__max_retries=5, **moved))[1] == 2
    assert not caplog.records
    with pytest.raises(ValueError, match=r"data\.num_windows \(2 then, 3 now\)"):
        find_checkpoint(config(resume="latest", data__num_windows=3, **moved))


def test_another_number_of_processes_is_told_and_with_deepspeed_refused(config, caplog):
    plain = config(resume="latest", max_steps=10)
    write_checkpoint(plain, 10, num_processes=2)
    find_checkpoint(plain)
    (record,) = caplog.records
    assert "2 processes" in record.getMessage() and "by 1:" in record.getMessage()
    split = replace(
        plain, deepspeed=str(ROOT / "configs/deepspeed/zero2.json"), output_dir=plain.output_dir + "-split"
    )
    write_checkpoint(split, 10, num_processes=2)
    with pytest.raises(ValueError, match=r"saved by 2 processes.* 1 now: start 2 processes"):
        find_checkpoint(split)


def test_all_that_a_run_writes_has_the_mode_that_the_umask_gives(config, run):
    previous = os.umask(0o022)
    try:
        run(config(max_steps=1))
    finally:
        os.umask(previous)
    files = [path for path in Path(config().output_dir).rglob("*") if not path.is_symlink()]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files if path.is_file()}
    assert modes == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.is_dir()} == {0o755}


@pytest.mark.parametrize("copy_frozen", [True, False])
def test_an_export_with_copies_outlives_its_base_and_one_with_links_names_the_dead_one(
    config, run, small_model, tmp_path, copy_frozen
):
    base = shutil.copytree(small_model, tmp_path / "base")
    short = config(model=str(base), max_steps=1, copy_frozen=copy_frozen)
    run(short)
    model = Path(short.output_dir) / "model"
    Mask2DiTPipeline.skeleton(model)
    base.rename(tmp_path / "moved")
    if copy_frozen:
        assert not any(path.is_symlink() for path in model.rglob("*"))
        Mask2DiTPipeline.from_pretrained(model)
        return
    for read in (Mask2DiTPipeline.skeleton, Mask2DiTPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match=r"model/\w+' is a link to '\S+base/\w+'.*copy_frozen=true"):
            read(model)
