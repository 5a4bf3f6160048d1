"""The command line that every task shares: `[CONFIG.yaml] [key=value …]`."""

import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from omegaconf import OmegaConf

from mask2dit.config import REPOSITORY, load_config

PREEMPTED = 75  # the exit status after SIGTERM or SIGHUP: saved, to be started again (EX_TEMPFAIL of sysexits.h)


def run_command(schema: type, task: str, default_config: str | Path, arguments: Sequence[str]) -> int:
    """Reads the configuration and runs a task with it.

    What cannot be carried out, by the task's or the configuration's own account (`ValueError`, `OSError`), is told in one
    sentence; anything else is a defect and keeps its trace.

    Args:
        schema: the configuration's dataclass.
        task: the function that takes the configuration, as "module:name". It is imported once the configuration is known to
            be good, since torch and what builds on it take seconds to import.
        default_config: the YAML file that is read unless an argument names another; one that is not in the current
            directory is looked for in the repository.
        arguments: of the command line, in any order.

    Returns:
        The exit status: the task's own if it returns one, else 0 done, 1 not possible, 130 interrupted.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mask2dit").setLevel(logging.INFO)
    if {"-h", "--help"} & set(arguments):
        print(
            f"usage: {Path(sys.argv[0]).name} [CONFIG.yaml] [key=value ...]\n\nWithout CONFIG.yaml: {default_config}\n"
        )
        print(f"Keys and their defaults; {schema.__module__} describes them:\n")
        print(OmegaConf.to_yaml(OmegaConf.structured(schema)))
        return 0
    # A job that is stopped ends like one that fails: what it was writing is removed.
    for number in stop_signals():
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        path, overrides = split_arguments(arguments)
        config = load_config(schema, path or _found(default_config), overrides)
        module, name = task.split(":")
        status = getattr(import_module(module), name)(config)
    except (ValueError, OSError, FloatingPointError) as error:
        # An OSError made here has its sentence where the system's have a phrase and a file's name.
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


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file among the arguments of a command, if any, and the `key=value` ones, whatever their order.

    Raises:
        ValueError: for a second file, or an option with dashes.
    """
    overrides = [argument for argument in arguments if re.match(r"-*[\w.\[\]]*=", argument)]
    files = [argument for argument in arguments if argument not in overrides]
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").partition("=")[0].replace("-", "_")
            raise ValueError(
                f"there is no option {argument!r}: settings are written {key or 'key'}=value, without dashes"
            )
    if len(files) > 1:
        raise ValueError(
            f"only one argument can be a file, but there are {len(files)}: {', '.join(map(repr, files))}; settings are "
            "written key=value without spaces, in quotes where the value has any"
        )
    return (files[0] if files else None), overrides


def _found(default_config: str | Path | None) -> str | Path | None:
    if default_config is None or Path(default_config).is_file() or not (REPOSITORY / default_config).is_file():
        return default_config
    return REPOSITORY / default_config


def stop_signals() -> list[int]:
    """SIGTERM, and SIGHUP, with which a closed terminal ends its jobs; not those that this one ignores, as under nohup."""
    return [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_noted() -> Iterator[Callable[[], str | None]]:
    """Notes the signals that stop a job instead of dying of them: a cluster that takes the node back leaves time to save.

    Yields:
        A function that returns the name of the first signal that has come, or None.
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
