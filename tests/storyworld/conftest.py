import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path("scripts/storyworld")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_a_stub(tmp_path):
    """Runs a script of the small world with a stub in place of Python, which appends its arguments to the file `calls`.
    Returns the exit status and what was called."""

    def start(script, stub, *arguments):
        (tmp_path / SCRIPTS).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / SCRIPTS / script, tmp_path / SCRIPTS)
        python = tmp_path / "python"
        python.write_text(stub)
        python.chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "PYTHON": str(python)}
        result = subprocess.run(["bash", tmp_path / SCRIPTS / script, *arguments], env=environment, check=False)
        return result.returncode, (tmp_path / "calls").read_text().splitlines()

    return start
