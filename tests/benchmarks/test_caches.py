"""The benchmarks of the context cache and of step caches, at tiny sizes."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as for a script, which imports its neighbours
    return importlib.import_module


def test_extension_prints_less_work_for_rarer_refreshes(load, capsys, tmp_path):
    path = tmp_path / "numbers.json"
    size = ["--heads", "1", "--layers", "2", "--latents", "1", "4", "4", "--text", "2", "--steps", "6", "--runs", "1"]
    load("extension").main(["--models", "wide", *size, "--threads", "1", "--json", str(path)])
    rows = {row["k"]: row for row in json.loads(path.read_text())["rows"]}
    assert capsys.readouterr().out.count("| another seed |") == 1
    assert rows["1"]["flops_ratio"] == 1 and rows["1"]["distance"] == 0
    work = {k: row.get("flops_ratio") for k, row in rows.items()}
    assert 1 > work["2"] > work["3"] == work["5"] == work["5 fp8"] > work["10"] == work["all"]  # 3, 2 and 1 refreshes
    assert 0 < rows["2"]["distance"] < rows["another seed"]["distance"]


@pytest.mark.slow
def test_the_table_of_caches_comes_from_one_run(load, capsys, tmp_path):
    path = tmp_path / "numbers.json"
    rows = ["exact", "k=2", "guidance", "first_block, k=5"]
    arguments = ["--rows", *rows, "--num-stories", "1", "--steps", "3", "--threads", "1", "--json", str(path)]
    load("caches").main(arguments)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == rows
    tokens = {line[0].removeprefix("| "): float(line[1]) for line in lines[2:]}
    assert tokens["exact"] == 1 and tokens["k=2"] == pytest.approx((2 + 1 / 3) / 3, abs=0.01)
    assert {len(stories) for stories in json.loads(path.read_text())["stories"].values()} == {1}
