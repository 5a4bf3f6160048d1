"""The script for a GPU, at small sizes on the CPU."""

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks/gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_is_reported_in_its_place_and_stops_no_other(gpu, tmp_path, monkeypatch):
    def run(arguments):
        name = arguments[arguments.index("--only") + 1]
        if name == "modes":
            return subprocess.CompletedProcess(arguments, 1, "", "Traceback\nRuntimeError: no kernel")
        return subprocess.CompletedProcess(arguments, 0, f"| table of {name} |\n", "")

    output = tmp_path / "results.md"
    output.write_text(f"# Results\n\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output", str(output)])
    gpu.main()
    text = output.read_text()
    assert text.startswith("# Results") and text.endswith("after\n") and "old" not in text
    assert "failed: RuntimeError: no kernel" in text
    assert all(f"| table of {name} |" in text for name in gpu.PARTS if name != "modes")
    gpu.main()
    assert output.read_text() == text


def test_backends_are_compared_with_the_dense_mask_in_bfloat16(gpu):
    rows = gpu.backends(Namespace(tiny=True)).splitlines()[2:]
    assert any(row.startswith("| native |") for row in rows)
    assert all(float(cell) < 0.1 for row in rows for cell in row.strip("| ").split(" | ")[1:])


def test_steps_run_with_random_weights(gpu):
    rows = gpu.steps(Namespace(tiny=True, runs=1)).splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["2B", "5B"]


def test_the_shell_script_calls_it():
    script = PATH.with_suffix(".sh")
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=True)
    assert not done.stderr
    assert "benchmarks/gpu.py" in script.read_text()
