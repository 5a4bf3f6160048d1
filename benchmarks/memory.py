"""Predicted memory of the published sizes, as the tables of docs/memory.md.

Nothing is downloaded, and no GPU is needed: the models are built from their known configurations, and their passes run on
torch's meta device. Takes about a minute.

    python benchmarks/memory.py                             # print the tables
    python benchmarks/memory.py --page docs/memory.md       # write them into the page
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mask2dit.files import write_text
from mask2dit.pipelines.footprint import CARDS, GIB, Footprint, count_steps, predict_footprint
from mask2dit.pipelines.published import TRANSFORMERS, published_skeleton, published_text_encoder
from mask2dit.pipelines.story import plan_windows
from mask2dit.reporting.tables import markdown_table, replace_part
from mask2dit.training.config import LoRATrainingConfig, TrainConfig
from mask2dit.training.memory import estimate_memory

NUM_SCENES, NUM_STEPS = 3, 50
ORDER = ("full", "model_offload", "group_offload", "fp8", "sequential_offload")
QUANTIZATIONS = ("int8", "nf4")
RANK = 64
LORA = LoRATrainingConfig(rank=RANK)


class Prediction(NamedTuple):
    """The footprints of a model, decoded as a whole and in tiles."""

    plain: Footprint
    tiled: Footprint


def predict(name: str, vae_tiling: bool = False, quantization: str | None = None) -> Footprint:
    """Predicts three scenes of the published size, generated together with guidance in bfloat16."""
    pipe = published_skeleton(name)
    size = pipe.fill_size(None, None, None)
    return predict_footprint(
        pipe,
        published_text_encoder(),
        pipe.video_shape(*size, NUM_SCENES),
        plan_windows(pipe, [""] * NUM_SCENES, (), None, *size),
        dtype=torch.bfloat16,
        steps=count_steps(range(NUM_STEPS), guided=True),
        vae_tiling=vae_tiling,
        quantization={part: quantization for part in ("transformer", "text_encoder")} if quantization else None,
    )


def modes_table(predictions: Mapping[str, Prediction]) -> str:
    """The memory of every mode on the GPU, decoded as a whole / in tiles, and in main memory."""
    rows = []
    for mode in ORDER:
        on_gpu = [" / ".join(_gib(footprint.on_gpu(mode)) for footprint in both) for both in predictions.values()]
        in_main = [_gib(both.plain.in_main_memory(mode)) for both in predictions.values()]
        rows.append([f"`{mode}`", *on_gpu, " / ".join(in_main)])
    return markdown_table(["`memory=`", *(f"{name}, GPU" for name in predictions), "main memory"], rows)


def work_table(predictions: Mapping[str, Prediction]) -> str:
    """The largest activations and the operations of the run."""
    rows = [
        [
            name,
            _gib(plain.activations["transformer"]),
            " / ".join(_gib(footprint.activations["vae"]) for footprint in (plain, tiled)),
            f"{sum(plain.flops.values()):.3g}",
        ]
        for name, (plain, tiled) in predictions.items()
    ]
    return markdown_table(
        ["model", "activations of a step, GiB", "of decoding a scene, GiB", "floating-point operations"], rows
    )


def cards_table(predictions: Mapping[str, Prediction]) -> str:
    """The recommended mode of each card."""
    rows = [[f"{size} GB", *(_recommended(both, int(size * 1e9)) for both in predictions.values())] for size in CARDS]
    return markdown_table(["card", *predictions], rows)


def quantized_table(footprints: Mapping[str, Footprint]) -> str:
    """The memory of quantized weights in the modes that they work with."""
    modes = next(iter(footprints.values())).modes
    rows = [[f"`{form}`", *(_gib(footprint.on_gpu(mode)) for mode in modes)] for form, footprint in footprints.items()]
    return markdown_table(["both components in", *(f"`memory={mode}`" for mode in modes)], rows)


def training_table() -> str:
    """The memory of fine-tuning on one process without DeepSpeed, of all weights and of LoRA's additions."""
    configs = {"all weights": TrainConfig(), f"LoRA of rank {RANK}": TrainConfig(lora=LORA)}
    configs |= {f"the same over `{form}`": TrainConfig(lora=LORA, quantization=form) for form in QUANTIZATIONS}
    rows = []
    for label, config in configs.items():
        estimates = [estimate_memory(config, published_skeleton(name), 1) for name in TRANSFORMERS]
        rows.append([label, *(f"{_gib(of.total)} ({_gib(of.total - of.activations)})" for of in estimates)])
    return markdown_table(["trained", *TRANSFORMERS], rows)


def _recommended(prediction: Prediction, capacity: int) -> str:
    plain, tiled = (next(iter(footprint.fitting(capacity)), None) for footprint in prediction)
    with_tiles = f"`memory={tiled} vae_tiling=true`" if tiled else "too small"
    if plain is None or plain == tiled:
        return f"`memory={plain}`" if plain else with_tiles
    return f"`memory={plain}`, or {with_tiles}"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="page into which the tables are written; none: print them")
    args = parser.parse_args()
    predictions = {name: Prediction(*(predict(name, tiling) for tiling in (False, True))) for name in TRANSFORMERS}
    largest = next(reversed(TRANSFORMERS))
    parts = {
        "sizes": modes_table(predictions),
        "work": work_table(predictions),
        "cards": cards_table(predictions),
        "training": training_table(),
        "quantized": quantized_table({form: predict(largest, quantization=form) for form in QUANTIZATIONS}),
    }
    if args.page is None:
        print("\n\n".join(parts.values()))
        return
    text = args.page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = replace_part(text, name, part)
    write_text(args.page, text)


if __name__ == "__main__":
    main()
