import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from mask2dit import files
from mask2dit.files import (
    append_line,
    atomic_folder,
    atomic_path,
    check_writable,
    keep_lines,
    move_new,
    open_tensors,
    read_json,
    read_lines,
    remove_partial_folders,
    write_lines,
    write_text,
)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        assert temporary.name.startswith(".")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("unreadable"), OSError(errno.EIO, "a sentence"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    write_text(path, "text")
    assert path.read_text() == "text"


def test_text_is_written_as_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "Mask²DiT, 镜头\n")
    assert (tmp_path / "a.txt").read_bytes() == "Mask²DiT, 镜头\n".encode()


def test_a_folder_is_created_and_left_empty(tmp_path):
    folder = tmp_path / "new" / "deep"
    check_writable(folder)
    check_writable(folder)
    assert folder.is_dir() and not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(
        PermissionError, match=re.escape(f"cannot write in the folder {str(folder)!r} (Permission denied)")
    ):
        check_writable(folder)
    with pytest.raises(OSError, match="Permission denied"):
        write_text(folder / "a.txt", "text")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"cannot write in the folder .*file"):
        check_writable(tmp_path / "file")


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    with pytest.raises(
        OSError, match=re.escape(f"cannot write in the folder {str(tmp_path)!r} (No space left")
    ) as caught:
        check_writable(tmp_path)
    assert caught.value.errno == errno.ENOSPC


NO_SPACE = "No space left on device"
# What libraries raise on a full disk.
FULL = {
    "text, images": OSError(errno.ENOSPC, NO_SPACE),
    "a quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": SafetensorError(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch.save, flushing": RuntimeError("basic_ios::clear: iostream error"),
    "numpy.save": OSError("100000 requested and 51168 written"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("make", [atomic_path, atomic_folder])
def test_a_full_disk_is_one_sentence_with_the_path_and_leaves_nothing(tmp_path, make, error):
    with (
        pytest.raises(OSError, match=r"cannot write \S+target.*make room") as caught,
        make(tmp_path / "target") as path,
    ):
        if make is atomic_path:
            path.write_text("half")
        raise error
    assert "\n" not in str(caught.value) and caught.value.filename is None
    assert not list(tmp_path.iterdir())


WRITERS = {
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch.save": lambda path: torch.save(torch.zeros(100_000), path),
    "numpy.save": lambda path: np.save(path.open("wb"), np.zeros(100_000)),
    "an image": lambda path: Image.fromarray(np.random.randint(0, 255, (300, 300, 3), np.uint8)).save(path, "PNG"),
    "text": lambda path: path.write_text("text" * 100_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_on_a_disk_that_is_full_ends_in_that_sentence(tmp_path, writer):
    """No file may grow beyond 64 KiB, which the writers see like a full disk. The limit is a process's own."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_files
from mask2dit.files import atomic_path
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with atomic_path(Path({str(tmp_path)!r}) / "target") as path:
        test_files.WRITERS[{writer!r}](path)
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"cannot write {tmp_path}/target (" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    previous = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.safetensors") as path:
            save_file({"a": torch.zeros(1)}, path)
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        append_line(tmp_path / "a.jsonl", {})
    finally:
        os.umask(previous)
    for name in ("a.safetensors", "folder/a.safetensors", "a.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_folder_appears_only_when_it_is_whole_and_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)
            assert not (tmp_path / "model").exists() or (tmp_path / "model/weights").read_text() == "old"
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("newer")
        raise KeyboardInterrupt
    assert (tmp_path / "model/weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_of_folders_is_removed(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial/weights").touch()
    (tmp_path / "model").mkdir()
    remove_partial_folders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("with_links", [True, False])
def test_a_file_is_moved_to_a_name_that_is_free_and_replaces_nothing(tmp_path, monkeypatch, with_links):
    if not with_links:

        def link(source, target):
            raise FileExistsError if Path(target).exists() else PermissionError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", link)
    for name in "ab":
        (tmp_path / name).write_text(name)
    move_new(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileExistsError, match="c is there already"):
        move_new(tmp_path / "b", tmp_path / "c")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "b", "c": "a"}


RECORDS = [{"step": 1, "text": "镜头\u2028"}, {"step": 2, "text": "caf\udce9"}]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "a.jsonl"
    for record in RECORDS:
        append_line(path, record)
    return path


def test_lines_are_read_as_they_were_written(lines):
    assert read_lines(lines) == RECORDS
    assert read_lines(lines, lambda record: record["step"]) == [1, 2]
    write_lines(lines, RECORDS[::-1])
    assert read_lines(lines) == RECORDS[::-1]
    assert read_lines(lines.with_name("nowhere.jsonl")) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "te', "{", '{"step": 3}'])
def test_a_last_line_that_was_cut_short_is_left_out_and_removed_by_the_next_one(lines, torn):
    with lines.open("a") as file:
        file.write(torn)
    assert read_lines(lines) == RECORDS
    append_line(lines, {"step": 4})
    assert read_lines(lines) == [*RECORDS, {"step": 4}]


def test_a_file_of_one_line_that_was_cut_short_is_begun_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"st')
    assert read_lines(path) == []
    append_line(path, {"step": 1})
    assert read_lines(path) == [{"step": 1}]


@pytest.mark.parametrize("damage", ["not json", "", '{"step": 3', "[]", "\x00\x00"])
def test_a_damaged_line_elsewhere_is_named(lines, damage):
    content = lines.read_text(errors="surrogateescape")
    lines.write_text(f"{content}{damage}\n", errors="surrogateescape")
    append_line(lines, {"step": 4})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is damaged"):
        read_lines(lines, lambda record: record["step"])


def test_a_file_that_does_not_grow_has_no_line_cut_short(lines):
    lines.write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is damaged"):
        read_lines(lines, grows=False)


def test_lines_that_are_not_wanted_are_removed(lines):
    with lines.open("a") as file:
        file.write('{"step": 3, "te')
    keep_lines(lines, lambda record: record["step"] > 1)
    assert lines.read_bytes().count(b"\n") == 1 and read_lines(lines) == RECORDS[1:]
    keep_lines(lines.with_name("nowhere.jsonl"), lambda record: True)


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.jsonl"
    append_line(path, {"step": 1})
    program = f"""
import resource, signal
from mask2dit.files import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    append_line({str(path)!r}, {{"text": "x" * 1000}})
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"cannot write {path} (" in result.stdout, result.stdout + result.stderr
    assert path.read_bytes() == b'{"step": 1}\n'


def test_processes_append_to_one_file_without_mixing_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    program = f"""
from mask2dit.files import append_line
for number in range(100):
    append_line({str(path)!r}, {{"text": "x" * 5000}})
"""
    writers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0] * 3
    assert len(read_lines(path, lambda record: record["text"])) == 300


def test_a_damaged_file_is_named_with_what_to_do(tmp_path):
    for name, content in (("a.json", "{"), ("b.json", ""), ("c.json", "[" * 100_000)):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged .*: fetch it again"):
            read_json(tmp_path / name, "fetch it again")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name, error in (("a.safetensors", ValueError), ("b.safetensors", FileNotFoundError)):
        with (
            pytest.raises(error, match=rf"{name} is .*: fetch it again"),
            open_tensors(tmp_path / name, "fetch it again"),
        ):
            pass
