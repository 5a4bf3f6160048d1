"""Files of this project: written whole or not at all, and read with errors that name them.

Failures of the disk raise an `OSError` whose message is a sentence with the path in it, whichever library wrote the file.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mask2dit.texts import parse_json

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Generator[Path]:
    """Yield a hidden temporary path beside `path`; on success it becomes `path`, on any failure it is removed.

    The suffix is kept, as some writers choose their format by it. A file that was at `path` before stays as it was
    until the new one is whole. Its mode is the one that the umask gives, even where the writer chose a private one.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
        OSError: if the disk is full; the message names `path`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        with write_errors(path):
            yield temporary
        apply_umask(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a hidden new folder `.NAME.partial` beside `path`; on success it replaces `path`, on any failure it is removed.

    What an earlier, killed process left under that name is removed first. For one writer at a time.

    Raises:
        OSError: if the disk is full; the message names `path`.
    """
    path = Path(path)
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with write_errors(path):
            partial.mkdir(parents=True)
            yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_new(source: Path, path: Path) -> None:
    """Renames a file to a name that is not taken, and that no other process can take at the same time.

    Raises:
        FileExistsError: if the name is taken.
    """
    try:
        os.link(source, path)  # unlike a rename, this replaces nothing
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, f"{path} is there already: choose another name") from None
    except OSError:  # a file system without hard links
        path.touch(exist_ok=False)
        source.replace(path)
    else:
        source.unlink()


def partial_folder(path: Path) -> Path:
    """Where a folder is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


def replace_folder(partial: Path, path: Path) -> None:
    """Puts a folder that is whole in its place, with the modes that the umask gives."""
    apply_umask(partial)
    old = path.with_name(f".{path.name}.old.partial")
    if path.exists():
        path.rename(old)  # and not removed here: a process killed meanwhile would leave half of it
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def remove_partial_folders(folder: str | os.PathLike) -> None:
    """Removes what killed processes left of folders in `folder` that they were writing."""
    for partial in Path(folder).glob(".*.partial"):
        shutil.rmtree(partial)


def apply_umask(path: Path) -> None:
    """Gives a file, or all files in a folder, the mode of a newly opened one: safetensors writes private files."""
    umask = os.umask(0o022)  # which can only be read by setting it
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


@contextmanager
def write_errors(path: str | os.PathLike) -> Generator[None]:
    """Turns the errors by which libraries report a full disk into an `OSError` whose message names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        code = reason = None
        if isinstance(error, OSError):
            # Not those that have a sentence of their own already.
            if error.errno in FULL and error.strerror == os.strerror(error.errno):
                code, reason = error.errno, error.strerror
            elif re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy.save
                code, reason = errno.ENOSPC, str(error)
        elif isinstance(error, SafetensorError):
            code, reason = _system_error(str(error)), str(error)
        elif re.search(r"inline_container|PytorchStreamWriter|iostream error", str(error)):  # torch.save
            code, reason = errno.EIO, str(error).split("\n")[0]
        if reason is None:
            raise
        raise OSError(code, f"cannot write {path} ({reason}): make room on that disk and run again") from error


def _system_error(message: str) -> int:
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else errno.EIO


def check_writable(folder: str | os.PathLike) -> None:
    """Create `folder` and prove that a file can be written in it. Call it before anything expensive.

    Raises:
        OSError: if it cannot be created or written in; PermissionError where permission is what is missing.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        # OSError picks its subclass by the error number.
        raise OSError(
            error.errno, f"cannot write in the folder {str(folder)!r} ({error.strerror}): choose another one"
        ) from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """The contents of a JSON file that this project wrote.

    Raises:
        ValueError: if it is damaged, naming the file and, by `remedy`, what to do.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


@contextmanager
def open_tensors(path: str | os.PathLike, remedy: str, framework: str = "pt") -> Generator[safe_open]:
    """Opens a safetensors file.

    Raises:
        FileNotFoundError, ValueError: if it is missing or damaged, naming the file and, by `remedy`, what to do.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def read_lines(
    path: str | os.PathLike, parse: Callable[[Any], Any] = lambda record: record, grows: bool = True
) -> list:
    """The records of a JSON Lines file in order; of a file that does not exist, none.

    Args:
        path: the file.
        parse: applied to each record; its `ValueError`, `KeyError` or `TypeError` marks the line as damaged.
        grows: the file is written by `append_line`. A last line without its line break is then left out: a process was
            stopped while writing it, or another one is at it.

    Raises:
        ValueError: for a damaged line, naming the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # Names of files need not be UTF-8; Python holds the bytes that are not as surrogates.
    *lines, last = path.read_bytes().split(b"\n")
    if last and not grows:
        lines.append(last)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse(parse_json(line.decode("utf-8", "surrogatepass"))))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: delete the line and run again") from error
    return records


def append_line(path: str | os.PathLike, record: Any) -> None:
    """Appends a record to a JSON Lines file, after removing a last line that was cut short.

    Processes of one machine can append to the same file. On a full disk the file stays as it was.

    Raises:
        OSError: if the line cannot be written; the message names the file.
    """
    line = _line(record)
    with write_errors(path), open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # or a line that another process is writing would look cut short
        end = _end_of_lines(file.fileno())
        file.truncate(end)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def write_lines(path: str | os.PathLike, records: Iterable) -> None:
    """Writes a JSON Lines file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, records)))


def keep_lines(path: str | os.PathLike, wanted: Callable[[Any], bool]) -> None:
    """Removes from a JSON Lines file, if there is one, the records that are not wanted and a last line that was cut short.

    Raises:
        ValueError: for a damaged line, as `read_lines`.
    """
    if Path(path).is_file():
        records = read_lines(path, lambda record: record if wanted(record) else None)
        write_lines(path, filter(None, records))


def _line(record: Any) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _end_of_lines(file: int) -> int:
    """Where the last whole line ends."""
    size = os.fstat(file).st_size
    while size and os.pread(file, 1, size - 1) != b"\n":
        size -= 1
    return size
