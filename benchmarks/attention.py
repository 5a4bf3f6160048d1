"""Time and memory of grouped attention under Mask²DiT's mask (v2), compared with two other methods for the same computation.

- grouped:  this project's `grouped_attention`.
- repeated: (b) also unmasked calls, but all video keys and values are copied once per scene, so that scenes fold into the
            batch, as in the published code. The published code copies twice (repeat, concatenate); this copies once.
- dense:    (a) one call of `scaled_dot_product_attention` with the (N, N) boolean mask, which is built beforehand.

All paths take the same inputs, their results are checked against each other, and their runs are interleaved. Memory is
the peak of what torch allocates in one call, results included.

    python benchmarks/attention.py --dtype bfloat16 --backward
    python benchmarks/attention.py --device cuda --dtype bfloat16 --heads 48 --video 17550
    python benchmarks/attention.py --transformer --layers 2 --runs 5

With `--transformer`, a whole transformer runs forward and backward: plain (all scenes at one timestep) and conditional
(all but the last scene are context at timestep 0). "repeated" is then the same model with (b) as `grouped_attention`.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from einops import rearrange, repeat
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mask2dit.models import attention
from mask2dit.models.attention import grouped_attention
from mask2dit.models.masks import dense_mask
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.scenes import SceneLayout

VARIANT = "v2"  # the variant that has a grouped form in the published code
TOLERANCE = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 3e-2,
}  # largest norm of the difference, relative to the norm of the value
MIB = 2**20

Step = Callable[[], tuple[torch.Tensor, ...]]  # one run of a path: its output and, with backward, the gradients
Case = dict[str, Step]  # path -> step


# Baselines


def repeated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SceneLayout,
    variant: str,
    backend=None,
    given: None = None,  # the attention processor always passes one
) -> torch.Tensor:
    """(b): folds scenes of equal length into the batch, each with its own copy of all video keys and values.

    Args:
        query, key, value: (B, N, H, D), tokens in the order of `layout`.

    Returns:
        (B, N, H, D).
    """
    if variant != VARIANT or len(set(layout.text_lengths)) > 1 or len(set(layout.video_lengths)) > 1:
        raise ValueError(f"repeated keys and values need {VARIANT} and equal scenes, but got {variant} and {layout}")
    scenes = layout.num_scenes

    def split(tokens):  # (B, N, H, D) -> a scene's own text, its own video, and all video: (B, S, H, n, D) each
        text, video = tokens.split([layout.text_length, layout.video_length], dim=1)
        own = [rearrange(part, "b (s n) h d -> b s h n d", s=scenes) for part in (text, video)]
        return *own, repeat(video, "b n h d -> b s h n d", s=scenes)  # views: nothing is copied before concatenation

    def attend(queries, keys, values):
        keys, values = torch.cat(keys, dim=3), torch.cat(values, dim=3)
        scene_batch = (rearrange(x, "b s h n d -> (b s) n h d") for x in (queries, keys, values))
        output = dispatch_attention_fn(*scene_batch, backend=backend)
        return rearrange(output, "(b s) n h d -> b (s n) h d", s=scenes)

    query_text, query_video, _ = split(query)
    key_text, key_video, key_all = split(key)
    value_text, value_video, value_all = split(value)
    text = attend(query_text, [key_text, key_video], [value_text, value_video])
    video = attend(query_video, [key_text, key_all], [value_text, value_all])
    return torch.cat([text, video], dim=1)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.BoolTensor
) -> torch.Tensor:
    """(a): one masked call. query, key, value: (B, N, H, D); mask: (N, N)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


# Cases


def attention_cases(args: argparse.Namespace) -> dict[str, Case]:
    """Attention alone: forward and, with `--backward`, forward and backward."""
    layout = SceneLayout((args.text,) * args.scenes, (args.video,) * args.scenes)
    shape = (args.batch, layout.length, args.heads, args.head_dim)
    query, key, value, grad = _random(args, [shape] * 4)

    paths = {
        "grouped": partial(grouped_attention, layout=layout, variant=VARIANT, backend=args.backend),
        "repeated": partial(repeated_attention, layout=layout, variant=VARIANT, backend=args.backend),
    }
    if not args.skip_dense:
        paths["dense"] = partial(dense_attention, mask=dense_mask(layout, VARIANT).to(args.device))

    @torch.no_grad()
    def forward(path):
        return (path(query, key, value),)

    def forward_backward(path):
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = path(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, grad)

    cases = {"forward": forward}
    if args.backward:
        cases["forward + backward"] = forward_backward
    return {case: {name: partial(run, path) for name, path in paths.items()} for case, run in cases.items()}


def transformer_cases(args: argparse.Namespace) -> dict[str, Case]:
    """A whole transformer, forward and backward."""
    # The cost does not depend on the shape of the grid: one latent frame per scene, as square as the tokens divide.
    rows = max(n for n in range(1, int(args.video**0.5) + 1) if args.video % n == 0)
    height, width = 2 * rows, 2 * args.video // rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2DiTTransformer3DModel(
            num_attention_heads=args.heads,
            attention_head_dim=args.head_dim,
            num_layers=args.layers,
            sample_height=height,
            sample_width=width,
            sample_frames=1,
            max_text_seq_length=args.text,
            use_rotary_positional_embeddings=True,
            mask_variant=VARIANT,
        )
    nn.Module.to(model, args.device, getattr(torch, args.dtype))  # diffusers' own method warns about a plain cast
    if args.backend:
        model.set_attention_backend(args.backend)
    parameters = list(model.parameters())
    latents, text, target = _random(
        args,
        [
            (args.batch, args.scenes, 16, height, width),
            (args.batch, args.scenes * args.text, 4096),
            (args.batch, args.scenes, 16, height, width),
        ],
    )
    plain = torch.full((args.batch, args.scenes), 500, device=args.device)
    conditional = plain.clone()
    conditional[:, :-1] = 0

    def forward_backward(timestep):
        output = model(latents, text, timestep, return_dict=False)[0]
        generated = timestep > 0  # only these scenes enter the loss
        loss = F.mse_loss(output[generated].float(), target[generated].float())
        return output.detach(), *torch.autograd.grad(loss, parameters)

    def repeated(timestep):
        with mock.patch.object(attention, "grouped_attention", repeated_attention):
            return forward_backward(timestep)

    return {
        f"transformer, {case}, forward + backward": {
            "grouped": partial(forward_backward, timestep),
            "repeated": partial(repeated, timestep),
        }
        for case, timestep in (("plain", plain), ("conditional", conditional))
    }


def _random(args: argparse.Namespace, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    return [torch.randn(shape, generator=generator).to(args.device, dtype) for shape in shapes]


def build_cases(args: argparse.Namespace) -> dict[str, Case]:
    return transformer_cases(args) if args.transformer else attention_cases(args)


# Measurement


def check_agreement(case: Case, tolerance: float) -> None:
    """Compares every path with "grouped": the output alone, and all gradients together. This also warms up the paths.

    Raises:
        RuntimeError: if a path's results differ.
    """
    expected = case["grouped"]()
    for name, step in case.items():
        result = step()
        for what, span in (("output", slice(0, 1)), ("gradients", slice(1, None))):
            pairs = [(a.float(), b.float()) for a, b in zip(result[span], expected[span], strict=True)]
            error = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
            norm = sum(b.square().sum().item() for _, b in pairs) ** 0.5
            if not error <= tolerance * norm:
                raise RuntimeError(f"{what} of {name} differ from grouped's by {error / norm:.1e} of their norm")


def interleaved_times(case: Case, runs: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each run. Paths alternate, and each round begins with another, so that all see the same load."""
    names = list(case)
    times = {name: [] for name in names}
    for run in range(runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            case[name]()
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak_extra_memory(step: Step, device: str) -> int:
    """Bytes that torch allocates in one run beyond those held before it, at their peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler logs each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    return _proc_field(meminfo, "MemAvailable") if meminfo.exists() else None


def _proc_field(path: Path, field: str) -> int:
    """The value in bytes of a field in a file of /proc, which gives it in KiB."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Report


def why_skip_dense(args: argparse.Namespace) -> str | None:
    """The reason to skip the dense mask, or None."""
    if args.transformer:
        return "--transformer compares grouped and repeated only"
    if args.skip_dense:
        return "--skip-dense"
    # The boolean mask, the kernel's additive bias of the same shape, and a third of both for the rest of a run.
    needed = _mask_bytes(args) * (1 + getattr(torch, args.dtype).itemsize) * 4 // 3
    free = _free_memory(args.device)
    if free is not None and needed > free:
        return f"its mask would take about {needed / MIB:.0f} MiB of the {free / MIB:.0f} MiB that are free"
    return None


def _mask_bytes(args: argparse.Namespace) -> int:
    return (args.scenes * (args.text + args.video)) ** 2


def report(case: str, times: dict[str, list[float]], memory: dict[str, int]) -> list[dict]:
    """Prints a case's table and returns its rows."""
    rows = []
    print(f"\n{case:<44}{'ms':>9}  {'(quartiles)':<20}{'grouped/it':>11}{'extra MiB':>12}{'grouped/it':>11}")
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    for name, runs in times.items():
        low, _, high = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else (runs[0],) * 3
        time_ratio = medians["grouped"] / medians[name]
        memory_ratio = memory["grouped"] / memory[name]
        rows.append(
            {
                "case": case,
                "path": name,
                "median_ms": medians[name],
                "grouped_time_ratio": time_ratio,
                "extra_bytes": memory[name],
                "grouped_memory_ratio": memory_ratio,
                "runs_ms": runs,
            }
        )
        print(
            f"  {name:<42}{medians[name]:>9.1f}  {f'({low:.1f} .. {high:.1f})':<20}{f'{time_ratio:.2f}x':>11}"
            f"{memory[name] / MIB:>12.1f}{f'{memory_ratio:.2f}x':>11}"
        )
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--scenes", type=_positive, default=3)
    sizes.add_argument("--text", type=_positive, default=226, help="text tokens of a scene (default: %(default)s)")
    sizes.add_argument("--video", type=_positive, default=2000, help="video tokens of a scene (default: %(default)s)")
    sizes.add_argument("--heads", type=_positive, default=8)
    sizes.add_argument("--head-dim", type=_positive, default=64)
    sizes.add_argument("--batch", type=_positive, default=1)
    sizes.add_argument("--layers", type=_positive, default=2, help="of the transformer (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=_positive, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--runs", type=_positive, default=20, help="timed runs of each path (default: %(default)s)")
    parser.add_argument(
        "--backend",
        choices=[backend.value for backend in AttentionBackendName],
        metavar="NAME",
        help="diffusers' attention backend for grouped and repeated (default: the active one)",
    )
    parser.add_argument("--backward", action="store_true", help="also forward and backward together")
    parser.add_argument("--skip-dense", action="store_true", help="leave out the dense mask")
    parser.add_argument("--transformer", action="store_true", help="a whole transformer instead of attention alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write settings and all measurements here")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: the folder {args.json.parent} does not exist")
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, but is {number}")
    return number


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    layers = f", {args.layers} layers" if args.transformer else ""
    print(
        f"{args.scenes} scenes x ({args.text} + {args.video}) tokens, {args.heads} heads x {args.head_dim}{layers}, "
        f"batch {args.batch}, {args.dtype}, {where}, torch {torch.__version__}\n"
        f"median of {args.runs} interleaved runs; grouped/it: below 1 is less than the path of that row"
    )
    reason = why_skip_dense(args)
    if reason:
        print(f"dense is left out: {reason}")
    else:
        print(f"dense: its mask of {_mask_bytes(args) / MIB:.1f} MiB is built beforehand and not counted")
    args.skip_dense = reason is not None

    rows = []
    for name, case in build_cases(args).items():
        check_agreement(case, TOLERANCE[args.dtype])
        times = interleaved_times(case, args.runs, args.device)
        memory = {path: peak_extra_memory(step, args.device) for path, step in case.items()}
        rows += report(name, times, memory)

    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
