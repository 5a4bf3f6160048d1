"""The script for a GPU, at small sizes on the CPU."""

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from mask2dit.reporting.tables import replace_part

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

    output, readme = tmp_path / "results.md", tmp_path / "readme.md"
    for page in (output, readme):
        page.write_text("# Title\n\n<!-- begin GPU -->\nold\n<!-- end GPU -->\nafter\n")
    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output", str(output), "--readme", str(readme)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cuda"))
    gpu.main()
    texts = [page.read_text() for page in (output, readme)]
    for text in texts:
        assert text.startswith("# Title") and text.endswith("after\n") and "old" not in text
        assert "On A Card, torch" in text and "failed: RuntimeError: no kernel" in text
    assert all(f"| table of {name} |" in texts[0] for name in gpu.PARTS if name != "modes")
    assert "| table of steps |" in texts[1] and "table of backends" not in texts[1] and "### " not in texts[1]
    gpu.main()
    assert [page.read_text() for page in (output, readme)] == texts


def test_a_page_without_a_place_is_named_before_anything_runs(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_run", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "none.md has no place" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--readme" in capsys.readouterr().err


def test_the_readme_and_the_results_have_a_place_for_the_measurements(gpu):
    for page in ("README.md", "benchmarks/RESULTS.md"):
        assert "\nnew\n" in replace_part((gpu.ROOT / page).read_text(encoding="utf-8"), "GPU", "new")


@pytest.mark.slow
def test_a_memory_mode_runs_or_says_why_not(gpu, small_model, monkeypatch):
    monkeypatch.setattr(gpu, "MEMORY_MODES", ("full", "model_offload"))
    rows = gpu.modes(Namespace(model=str(small_model))).splitlines()[2:]
    assert float(rows[0].split("|")[2]) > 0
    if not torch.cuda.is_available():
        assert "failed: error: memory=model_offload" in rows[1]


def test_backends_are_compared_with_the_dense_mask_in_bfloat16(gpu):
    rows = gpu.backends(Namespace(tiny=True)).splitlines()[2:]
    assert any(row.startswith("| native |") for row in rows)
    assert all(float(cell) < 0.1 for row in rows for cell in row.strip("| ").split(" | ")[1:])


def test_steps_run_with_random_weights(gpu):
    rows = gpu.steps(Namespace(tiny=True, runs=1)).splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["CogVideoX-2B", "Mask²DiT-5B"]


def test_the_shell_script_calls_it():
    script = PATH.with_suffix(".sh")
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=True)
    assert not done.stderr
    assert "benchmarks/gpu.py" in script.read_text()
