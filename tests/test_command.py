import signal
import subprocess
import sys

import pytest

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
def run(tmp_path):
    """Runs a task that sends itself a signal while it writes a file. Returns its status."""
    (tmp_path / "package").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "package/task.py").write_text(TASK)
    program = "import sys, task; from mask2dit.command import run_command; "
    program += "sys.exit(run_command(task.Config, 'task:task', None, sys.argv[1:]))"

    def in_another_process(number, before=""):
        arguments = [f"folder={tmp_path / 'out'}", f"signal={int(number)}"]
        code = f"import sys; sys.path.insert(0, {str(tmp_path / 'package')!r}); {before}{program}"
        return subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode

    return in_another_process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_task_that_is_stopped_removes_what_it_was_writing(run, tmp_path, number):
    assert run(number) == 128 + number
    assert not list((tmp_path / "out").iterdir())


def test_a_task_under_nohup_goes_on_when_the_terminal_is_closed(run, tmp_path):
    assert run(signal.SIGHUP, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); ") == 0
    assert (tmp_path / "out/result").read_text() == "whole"
