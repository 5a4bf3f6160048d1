"""The command line that all tasks share: `[CONFIG.yaml] [key=value …]`."""

import inspect
import logging
import re
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mask2dit.config import load_config
from mask2dit.usage import help_text

PREEMPTED = 75  # exit status after SIGTERM or SIGHUP: state saved, restart to continue (EX_TEMPFAIL of sysexits.h)


def run_command(
    schema: type,
    task: str,
    default_config: str | Path | None,
    arguments: Sequence[str],
    *,
    name: str | None = None,
    summary: str | None = None,
    positionals: Sequence[str] = (),
) -> int:
    """Reads the configuration and runs a task with it.

    Expected errors (`ValueError`, `OSError`, too little memory) print one line; anything else is a bug and keeps its
    traceback.

    Args:
        schema: the configuration's dataclass.
        task: the function that takes the configuration, as "module:name". It is imported after the configuration has been
            checked, since torch and the libraries on top of it take seconds to import.
        default_config: the YAML file that is read unless an argument names another. None: the defaults of the dataclass.
        arguments: command-line arguments, in any order.
        name: how the command is called, for `--help`. None: as this process was called.
        summary: what the command does, for `--help`. None: the first paragraph of the schema's docstring.
        positionals: the keys that arguments without "=" set, in order. A single one that ends in .yaml or .yml is the
            configuration file, as it is without such keys.

    Returns:
        The exit status: the task's own if it returns one, otherwise 0 (done), 1 (expected error) or 130 (interrupted).
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mask2dit").setLevel(logging.INFO)
    # While it is imported, an installed torchao causes warnings about kernels for other machines.
    for library in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if {"-h", "--help"} & set(arguments):
        file = f"[CONFIG.yaml | {' '.join(map(str.upper, positionals))}]" if positionals else "[CONFIG.yaml]"
        usage = f"{name or program()} {file} [key=value ...]"
        print(help_text(usage, summary or (inspect.getdoc(schema) or "").split("\n\n")[0], schema, default_config))
        return 0
    # A stopped job ends like a failed one: its unfinished output is removed.
    for number in stop_signals():
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        files, overrides = split_arguments(arguments, max(1, len(positionals)))
        path = next(iter(files), None)
        if path and positionals and (len(files) > 1 or not path.endswith((".yaml", ".yml"))):
            path, overrides = None, [*overrides, *(f"{key}={file}" for key, file in zip(positionals, files))]
        config = load_config(schema, path or default_config, overrides)
        status = load(task)(config)
    except (ValueError, OSError, FloatingPointError) as error:
        # An OSError raised by this project holds a full sentence; one of the system holds a phrase and a file name.
        is_sentence = isinstance(error, OSError) and error.strerror and not error.filename
        print(f"error: {error.strerror if is_sentence else error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "out of memory")
        print(
            f"error: the memory does not suffice: choose smaller sizes or another memory mode ({reason})",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def split_arguments(arguments: Sequence[str], most: int = 1) -> tuple[list[str], list[str]]:
    """Splits a command's arguments into the files, of which there may be `most`, and the `key=value` ones, in any order.

    Raises:
        ValueError: for one file too many, or an option with dashes.
    """
    overrides = [argument for argument in arguments if re.match(r"-*[\w.\[\]]*=", argument)]
    files = [argument for argument in arguments if argument not in overrides]
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").partition("=")[0].replace("-", "_")
            raise ValueError(
                f"there is no option {argument!r}: settings are written {key or 'key'}=value, without dashes"
            )
    if len(files) > most:
        limit = "one argument can be a file" if most == 1 else f"{most} arguments can be without ="
        raise ValueError(
            f"only {limit}, but there are {len(files)}: {', '.join(map(repr, files))}; settings are "
            "written key=value without spaces, in quotes where the value has any"
        )
    return files, overrides


def load(address: str) -> Any:
    """Imports the object at "module:name"."""
    module, name = address.split(":")
    return getattr(import_module(module), name)


def program() -> str:
    """Returns how this process was called, such as "python -m mask2dit.training"."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def stop_signals() -> list[int]:
    """Returns SIGTERM and SIGHUP (sent when a terminal closes), without those that this process ignores, as under nohup."""
    return [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_noted() -> Generator[Callable[[], str | None]]:
    """Records stop signals instead of exiting, so that a job can save when its cluster takes the node back.

    Yields:
        A function that returns the name of the first signal received, or None.
    """
    noted = []
    previous = {
        number: signal.signal(number, lambda number, frame: noted.append(signal.Signals(number).name))
        for number in stop_signals()
    }
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
