"""Time, memory and accuracy of extension with the context cache, compared with computing every scene at every step.

Two of three scenes are given. `k` is `context_refresh`: the given scenes are computed at the first and every k-th step. Rows:

- 1:        exact, without a cache.
- 2 … all:  with it; "all" computes the given scenes once.
- 5 fp8:    as 5, with keys and values kept in 8 bits.

Time is that of sampling alone, without text encoder and VAE, as ratios of interleaved runs; on CPU it is CPU time, which
other programs disturb less. FLOPs are counted by torch. Memory is the peak of what torch allocates in one call. Distance is
the RMS difference of the generated scene's latents from row 1; the last row gives that of another seed.

    python benchmarks/extension.py
    python benchmarks/extension.py --device cuda --dtype bfloat16 --heads 48 --layers 8 --latents 13 60 90 --text 226

The first model has the shipped weights of the small world, and tells stories of that world. The second is wider and random.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from attention import MIB, peak_extra_memory
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mask2dit.models.loading import select_sampler
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.storyworld.render import render_scene
from mask2dit.storyworld.trial import FIRST_STORY
from mask2dit.storyworld.world import caption, sample_story

STORYWORLD = Path(__file__).parents[1] / "models" / "storyworld"
GENERATED = (False, False, True)
EXACT = "1"
ROWS = {
    EXACT: {},
    "2": {"context_refresh": 2},
    "3": {"context_refresh": 3},
    "5": {"context_refresh": 5},
    "5 fp8": {"context_refresh": 5, "context_cache_dtype": "fp8"},
    "10": {"context_refresh": 10},
    "all": {"context_refresh": 1000},
}


class Case(NamedTuple):
    """A model and the stories that it extends."""

    pipe: Mask2DiTPipeline
    arguments: dict
    """Arguments of the pipeline, but for the generator."""


# Models


@torch.no_grad()
def storyworld(args: argparse.Namespace) -> Case:
    """The small world's model, with the first tuning stories."""
    dtype = getattr(torch, args.dtype)
    pipe = Mask2DiTPipeline.from_pretrained(STORYWORLD, torch_dtype=dtype).to(args.device)
    pipe.scheduler = select_sampler(pipe.scheduler, "dpm")
    seeds = range(FIRST_STORY["tuning"], FIRST_STORY["tuning"] + args.batch)
    stories = [sample_story(seed, len(GENERATED), "train") for seed in seeds]
    prompts = [[caption(story, scene) for scene in range(len(GENERATED))] for story in stories]
    rendered = [[render_scene(story, scene, 9, 64, 64) for scene in range(2)] for story in stories]
    arguments = {
        "prompt_embeds": pipe.encode_prompt(prompts),
        "negative_prompt_embeds": pipe.encode_prompt([[""] * len(GENERATED)] * args.batch),
        "context_latents": pipe.encode_context(rendered, (9, 9), 64, 64),
        **{"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 2.0},
    }
    return Case(pipe, arguments)


@torch.no_grad()
def wide(args: argparse.Namespace) -> Case:
    """A wider model with random weights and random inputs."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = args.latents
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Mask2DiTTransformer3DModel(
            num_attention_heads=args.heads,
            num_layers=args.layers,
            sample_height=height,
            sample_width=width,
            sample_frames=1 + 4 * (frames - 1),
            text_embed_dim=512,
            max_text_seq_length=args.text,
            use_rotary_positional_embeddings=True,
        )
    dtype = getattr(torch, args.dtype)
    nn.Module.to(transformer, args.device, dtype)  # diffusers' own method warns about a plain cast
    vae = AutoencoderKLCogVideoX(  # sampling needs its scales alone
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        layers_per_block=1,
        norm_num_groups=2,
    )
    small = Mask2DiTPipeline.skeleton(STORYWORLD)  # for its schedule
    pipe = Mask2DiTPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.to(args.device),
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler.from_config(small.scheduler.config, prediction_type="v_prediction"),
    )
    embeds = torch.randn(2, args.batch, len(GENERATED), args.text, 512, generator=generator).to(args.device, dtype)
    context = torch.randn(args.batch, 2 * frames, 16, height, width, generator=generator).to(args.device, dtype)
    arguments = {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "context_latents": context,
        **{"height": 8 * height, "width": 8 * width, "num_frames": 1 + 4 * (frames - 1)},
    }
    return Case(pipe, arguments)


MODELS = {"storyworld": storyworld, "wide": wide}


# Measurement


def sample(case: Case, args: argparse.Namespace, row: str, seed: int = 0) -> torch.Tensor:
    """Samples the third scene. Returns its latents (B, F, C, h, w)."""
    latents = case.pipe(
        **case.arguments,
        **ROWS[row],
        scene_mask=GENERATED,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return latents.chunk(len(GENERATED), dim=1)[-1].float()


def count_flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def interleaved_times(steps: dict[str, Callable[[], object]], runs: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each run: of the GPU, or CPU time. Each round begins with another row."""
    names, times = list(steps), defaultdict(list)
    for run in range(runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            if device == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device == "cuda" else time.process_time
            started = clock()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (clock() - started))
    return times


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference."""
    return (a - b).square().mean().sqrt().item()


def measure(model: str, args: argparse.Namespace) -> list[dict]:
    """Measures all rows of a model."""
    case = MODELS[model](args)
    case.pipe.set_progress_bar_config(disable=True)
    results = {row: sample(case, args, row) for row in ROWS}  # also warms up
    flops = {row: count_flops(partial(sample, case, args, row)) for row in ROWS}
    times = interleaved_times({row: partial(sample, case, args, row) for row in ROWS}, args.runs, args.device)
    # The peak is that of the first step, or of the second beside what the first kept.
    short = argparse.Namespace(**{**vars(args), "steps": 2})
    memory = {row: peak_extra_memory(partial(sample, case, short, row), args.device) for row in ROWS}
    rows = [
        {
            "model": model,
            "k": row,
            "flops_ratio": flops[row] / flops[EXACT],
            # Of the runs of one round, which see about the same load
            "time_ratios": [run / exact for run, exact in zip(times[row], times[EXACT], strict=True)],
            "runs_ms": times[row],
            "extra_bytes": memory[row],
            "distance": distance(results[row], results[EXACT]),
        }
        for row in ROWS
    ]
    other = distance(sample(case, args, EXACT, seed=1), results[EXACT])
    return [*rows, {"model": model, "k": "another seed", "distance": other}]


# Report


def report(rows: list[dict]) -> None:
    """Prints a model's table."""
    print(f"\n| {rows[0]['model']}, k | FLOPs | time (min … max) | ms | extra MiB | distance |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        if "runs_ms" not in row:
            print(f"| {row['k']} | | | | | {row['distance']:.2g} |")
            continue
        ratios = row["time_ratios"]
        print(
            f"| {row['k']} | {row['flops_ratio']:.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … "
            f"{max(ratios):.2f}) | {statistics.median(row['runs_ms']):.0f} | "
            f"{row['extra_bytes'] / MIB:.0f} | {row['distance']:.2g} |"
        )


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="stories sampled together (default: %(default)s)")
    wider = parser.add_argument_group("the wider model")
    wider.add_argument("--heads", type=int, default=8, help="of width 64 (default: %(default)s)")
    wider.add_argument("--layers", type=int, default=4)
    wider.add_argument("--text", type=int, default=32, help="text tokens of a scene (default: %(default)s)")
    wider.add_argument("--latents", type=int, nargs=3, default=[3, 16, 24], metavar=("F", "H", "W"), help="of a scene")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each row (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write settings and all measurements here")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{args.steps} steps of DPM, {args.batch} stories, {args.dtype}, {where}, torch {torch.__version__}\n"
        f"wide: {args.heads} heads x 64, {args.layers} layers, scenes of {args.text} text tokens and {args.latents} latents\n"
        f"FLOPs and time are ratios to k = {EXACT}; medians of {args.runs} interleaved runs"
    )
    rows = []
    for model in args.models:
        of_model = measure(model, args)
        report(of_model)
        rows += of_model
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
