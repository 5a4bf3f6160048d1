import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from mask2dit.command import run_command, split_arguments

told = []


@dataclass
class Settings:
    steps: int = 1
    text: str = ""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} has to be at least 1")


def note(settings: Settings) -> None:
    told.append(settings)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty directory with two configurations, and gives its status and what it says of errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("steps: 5")
    (tmp_path / "default.yaml").write_text("steps: 3")
    told.clear()

    def run(*arguments):
        status = run_command(Settings, f"{__name__}:note", "default.yaml", arguments)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ([], Settings(3)),
        (["my.yaml"], Settings(5)),
        (["my.yaml", "text=a"], Settings(5, "a")),
        (["text=a", "my.yaml"], Settings(5, "a")),
        (["text=a=b", "my.yaml", "steps=7"], Settings(7, "a=b")),
    ],
)
def test_file_and_settings_come_in_any_order(run, arguments, settings):
    assert run(*arguments) == (0, "")
    assert told == [settings]


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (["steps=0", "my.yaml"], "error: steps=0 "),
        (["my.yaml", "steps=0"], "error: steps=0 "),
        (["my.yaml", "stesp=0"], "error: stesp=0: there is no key 'stesp'"),
        (["--steps=2"], "'--steps=2': settings are written steps=value"),
        (["--steps", "2"], "'--steps': settings are written steps=value"),
        (["steps", "2"], "'steps', '2'"),
        (["steps", "=", "2"], "key=value without spaces"),
        (["my.yaml", "default.yaml"], "'my.yaml', 'default.yaml'"),
        (["steps"], "'steps' does not exist"),
        (["."], "'.' is a folder"),
    ],
)
def test_the_argument_that_is_wrong_is_the_one_that_is_named(run, arguments, culprit):
    status, error = run(*arguments)
    assert status == 1 and culprit in error and error.count("\n") == 1
    assert not told


def test_a_file_may_have_an_equals_sign_in_its_path(tmp_path):
    assert split_arguments(["./a=b.yaml", "c=d"]) == (["./a=b.yaml"], ["c=d"])


def test_without_a_configuration_file_the_defaults_of_the_dataclass_apply():
    told.clear()
    assert run_command(Settings, f"{__name__}:note", None, ["text=a"]) == 0
    assert told == [Settings(1, "a")]


@pytest.mark.parametrize(
    "arguments, settings",
    [
        (["a.csv", "steps=2"], Settings(2, "a.csv")),
        (["steps=2", "a.csv"], Settings(2, "a.csv")),
        (["my.yaml"], Settings(5)),
        (["my.yaml", "text=a"], Settings(5, "a")),
    ],
)
def test_a_file_that_is_no_configuration_sets_the_positional_key(run, arguments, settings):
    assert run_command(Settings, f"{__name__}:note", None, arguments, positionals=("text",)) == 0
    assert told == [settings]


def take_memory(settings: Settings) -> None:
    if settings.text == "python":
        raise MemoryError
    if settings.text == "torch":
        torch.empty(10**15)
    raise RuntimeError("a defect")


@pytest.mark.parametrize("by", ["python", "torch"])
def test_too_little_memory_is_told_in_one_sentence(tmp_path, capsys, by):
    assert run_command(Settings, f"{__name__}:take_memory", None, [f"text={by}"]) == 1
    error = capsys.readouterr().err
    assert "memory does not suffice" in error and error.count("\n") == 1


def test_another_runtime_error_keeps_its_trace():
    with pytest.raises(RuntimeError, match="a defect"):
        run_command(Settings, f"{__name__}:take_memory", None, [])


TASK = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from mask2dit.files import atomic_path

@dataclass
class Config:
    folder: str = "."
    signal: int = 0

def task(config):
    with atomic_path(Path(config.folder) / "result") as path:
        path.write_text("half")
        os.kill(os.getpid(), config.signal)
        path.write_text("whole")
"""


@pytest.fixture
def stop(tmp_path):
    """Runs a task that sends itself a signal while it writes a file. Returns its status."""
    (tmp_path / "package").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "package/task.py").write_text(TASK)
    # As in a terminal: under nohup, or in the background of a shell, signals are ignored.
    terminal = (
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler); "
    )
    program = "import sys, task; from mask2dit.command import run_command; "
    program += "sys.exit(run_command(task.Config, 'task:task', None, sys.argv[1:]))"

    def in_another_process(number, before=""):
        arguments = [f"folder={tmp_path / 'out'}", f"signal={int(number)}"]
        setup = f"import signal, sys; sys.path.insert(0, {str(tmp_path / 'package')!r}); {terminal}"
        code = f"{setup}{before}{program}"
        return subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode

    return in_another_process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_task_that_is_stopped_removes_what_it_was_writing(stop, tmp_path, number):
    assert stop(number) == 128 + number
    assert not list((tmp_path / "out").iterdir())


def test_a_task_under_nohup_goes_on_when_the_terminal_is_closed(stop, tmp_path):
    assert stop(signal.SIGHUP, "signal.signal(signal.SIGHUP, signal.SIG_IGN); ") == 0
    assert (tmp_path / "out/result").read_text() == "whole"
