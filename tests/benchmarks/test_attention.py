import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from mask2dit.models.attention import grouped_attention
from mask2dit.scenes import SceneLayout

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"
TINY = ["--text", "3", "--video", "8", "--heads", "2", "--head-dim", "16", "--runs", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch", [1, 2])
def test_repeated_keys_and_values_give_what_grouped_attention_gives(benchmark, batch):
    layout = SceneLayout((3, 3, 3), (8, 8, 8))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, layout.length, 2, 16, generator=generator, requires_grad=True) for _ in range(3)]

    repeated = benchmark.repeated_attention(*inputs, layout, "v2")
    grouped = grouped_attention(*inputs, layout, "v2")

    torch.testing.assert_close(repeated, grouped)
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in (repeated, grouped)]
    torch.testing.assert_close(*gradients)


def test_repeated_keys_and_values_refuse_scenes_that_do_not_fold(benchmark):
    tokens = torch.zeros(1, 6 + 12, 2, 16)
    with pytest.raises(ValueError, match="equal scenes"):
        benchmark.repeated_attention(tokens, tokens, tokens, SceneLayout((3, 3), (8, 4)), "v2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_table_has_ratios_of_time_and_memory(benchmark, capsys, tmp_path, dtype):
    path = tmp_path / "numbers.json"

    benchmark.main([*TINY, "--dtype", dtype, "--backward", "--json", str(path)])

    output = capsys.readouterr().out
    rows = {(row["case"], row["path"]): row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {
        (case, path) for case in ("forward", "forward + backward") for path in ("grouped", "repeated", "dense")
    }
    for (case, name), row in rows.items():
        ratio = rows[case, "grouped"]["extra_bytes"] / row["extra_bytes"]
        assert row["grouped_memory_ratio"] == ratio
        assert (ratio == 1) == (name == "grouped")
        assert len(row["runs_ms"]) == 2
        assert re.search(rf"^  {name} .*\d+\.\d\dx .*{ratio:.2f}x$", output, re.MULTILINE)
    assert len(re.findall(r"^  (?:repeated|dense) .*\d+\.\d\dx .*\d+\.\d\dx$", output, re.MULTILINE)) == 4


def test_transformer_runs_plain_and_conditional(benchmark, capsys):
    benchmark.main([*TINY, "--transformer", "--layers", "1"])

    output = capsys.readouterr().out
    assert re.findall(r"transformer, (\w+), forward \+ backward", output) == ["plain", "conditional"]
    assert len(re.findall(r"^  repeated .*\d+\.\d\dx .*\d+\.\d\dx$", output, re.MULTILINE)) == 2


def test_a_path_that_computes_something_else_is_reported(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "dense_attention", lambda query, key, value, mask: value)
    with pytest.raises(RuntimeError, match="output of dense"):
        benchmark.main(TINY)


def test_dense_mask_that_does_not_fit_is_left_out_with_a_reason(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_free_memory", lambda device: 1000)

    benchmark.main(TINY)

    output = capsys.readouterr().out
    assert "dense is left out: its mask would take" in output
    assert not re.search(r"^  dense", output, re.MULTILINE)


def test_memory_is_what_the_call_allocates_at_its_peak(benchmark):
    argv = ["--text", "64", "--video", "1024", "--heads", "4", "--head-dim", "64"]
    args = benchmark.parse_args(argv)
    tensor = 3 * (64 + 1024) * 4 * 64 * 4  # bytes of one (B, N, H, D)

    extra = benchmark.peak_extra_memory(benchmark.build_cases(args)["forward"]["repeated"], "cpu")

    # Keys and values of three scenes are about six tensors, the outputs one, their concatenation not yet there.
    assert extra == pytest.approx(7 * tensor, rel=0.15)
