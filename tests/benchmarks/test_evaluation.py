import importlib.util
from pathlib import Path

import pytest


def test_the_benchmark_compares_equal_distances():
    pytest.importorskip("scipy", reason="the benchmark compares with scipy")
    path = Path(__file__).parents[2] / "benchmarks/evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    first, second = benchmark.features(12, 40, 0, 0.0), benchmark.features(12, 40, 1, 0.1)
    expected = benchmark.distance_by_sqrtm(first, second)
    assert benchmark.frechet_distance_of_features(first, second) == pytest.approx(expected, rel=1e-6)
