"""The tables of predicted memory, and the pages that hold them."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mask2dit.pipelines.footprint import GIB, Footprint, WeightSizes
from mask2dit.pipelines.published import TRANSFORMERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(page: Path, first_cell: str) -> list[str]:
    """Cells of the first row of a page that begins with a cell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_card_takes_the_first_mode_that_fits_and_tiles_where_they_help(memory):
    plain = Footprint(
        weights={
            "text_encoder": WeightSizes(9 * GIB, GIB // 4, 9 * GIB, 9 * GIB),
            "transformer": WeightSizes(10 * GIB, GIB // 8, GIB, 5 * GIB),
            "vae": WeightSizes(GIB, GIB // 64, GIB, GIB),
        },
        activations={"text_encoder": 0, "transformer": 2 * GIB, "vae": 15 * GIB},
        frames=GIB,
        flops={"transformer": 1},
    )
    tiled = replace(plain, activations={**plain.activations, "vae": GIB})
    table = memory.cards_table({"a model": memory.Prediction(plain, tiled)}).splitlines()
    assert table[2:] == [
        "| 16 GB | `memory=model_offload vae_tiling=true` |",
        "| 24 GB | `memory=model_offload` |",
        "| 48 GB | `memory=full` |",
        "| 80 GB | `memory=full` |",
    ]
    assert "| `full` | 35.0 / 22.0 | 21.0 |" in memory.modes_table({"a model": memory.Prediction(plain, tiled)})


def test_the_readme_and_the_page_on_memory_have_the_same_predictions(memory):
    for mode in memory.ORDER:
        small, large = row(ROOT / "docs/memory.md", f"`{mode}`")[1:3]
        of_readme = [re.findall(r"[\d.]+", cell) for cell in row(ROOT / "README.md", f"`{mode}`")[3:]]
        assert of_readme == [large.split(" / "), small.split(" / ")], mode


@pytest.mark.slow
def test_the_page_on_memory_has_what_is_predicted_now(memory):
    name = next(iter(TRANSFORMERS))
    footprint = memory.predict(name)
    for mode in memory.ORDER:
        predicted = f"{footprint.on_gpu(mode) / GIB:.1f}"
        assert row(ROOT / "docs/memory.md", f"`{mode}`")[1].split(" / ")[0] == predicted
    assert row(ROOT / "docs/memory.md", name)[3] == f"{sum(footprint.flops.values()):.3g}"
    assert memory.training_table() in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
