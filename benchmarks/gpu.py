"""All measurements that need a GPU, as the GPU parts of benchmarks/RESULTS.md and of the README.

Each part runs in a process of its own. A part that fails is reported in its place, and the others go on. The README gets the
tables of `README_PARTS`.

    bash benchmarks/gpu.sh
    bash benchmarks/gpu.sh --model models/Mask2DiT --parts backends steps modes
    bash benchmarks/gpu.sh --tiny --output /tmp/results.md --readme /tmp/readme.md      # small sizes, also without a GPU

Both pages need the lines `<!-- begin GPU -->` and `<!-- end GPU -->`, between which their part is written.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from mask2dit.files import write_text
from mask2dit.models.attention import check_attention_backend, grouped_attention
from mask2dit.models.masks import MASK_VARIANTS, dense_mask
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.footprint import GIB, measure
from mask2dit.pipelines.memory import MEMORY_MODES
from mask2dit.pipelines.published import TRANSFORMERS
from mask2dit.pipelines.untrained import build_untrained_model
from mask2dit.reporting.tables import replace_part
from mask2dit.scenes import SceneLayout

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "text_embed_dim": 64}


def backends(args: argparse.Namespace) -> str:
    """The largest error of every installed attention backend against the dense mask in float32, relative to its mean."""
    layout = SceneLayout((32, 32, 32), (256, 256, 128))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, layout.length, 4, 64, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(3)]
    lines = ["| backend | " + " | ".join(MASK_VARIANTS) + " |", "|---|" + "---|" * len(MASK_VARIANTS)]
    for name in sorted(backend.value for backend in AttentionBackendName):
        try:
            check_attention_backend(name, DEVICE)
        except ValueError:  # not installed, or not for this device
            continue
        errors = []
        for variant in MASK_VARIANTS:
            query, key, value = (x.float().transpose(1, 2) for x in tokens)
            mask = dense_mask(layout, variant).to(DEVICE)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            try:
                found = grouped_attention(*tokens, layout, variant, name).float().transpose(1, 2)
                errors.append(f"{(found - expected).abs().max() / expected.abs().mean():.3f}")
            except (RuntimeError, ValueError, ImportError) as error:
                errors.append(f"failed: {str(error).splitlines()[0][:60]}")
        lines.append(f"| {name} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


@torch.no_grad()
def steps(args: argparse.Namespace) -> str:
    """One guided step of 3 scenes with random weights: time, and peak memory next to the predicted one."""
    lines = ["| shape | s per step | peak, GiB | predicted, GiB |", "|---|---|---|---|"]
    for name, config in TRANSFORMERS.items():
        config, size = ({**config, **TINY}, (3, 8, 12)) if args.tiny else (config, (13, 60, 90))
        with DEVICE:
            model = Mask2DiTTransformer3DModel(**config).to(torch.bfloat16).eval()
        frames, height, width = size

        def step(device, model=model, frames=frames, height=height, width=width):
            text = 3 * model.config.max_text_seq_length
            return model(
                torch.zeros(2, 3 * frames, 16, height, width, dtype=model.dtype, device=device),
                torch.zeros(2, text, model.config.text_embed_dim, dtype=model.dtype, device=device),
                torch.zeros(2, 3, dtype=torch.long, device=device),
            ).sample

        step(DEVICE)
        peak = "-"
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(args.runs):
            step(DEVICE)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            peak = f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
        seconds = (time.perf_counter() - started) / args.runs
        weights = sum(parameter.nbytes for parameter in model.parameters())
        model.to("meta")
        predicted = (weights + measure(lambda step=step: step("meta")).peak) / GIB
        lines.append(f"| {name} | {seconds:.3f} | {peak} | {predicted:.2f} |")
        del model
    return "\n".join(lines)


def modes(args: argparse.Namespace) -> str:
    """Every memory mode with the model of --model (a small untrained one if none was given): a run of 2 steps, by
    `mask2dit generate`."""
    model = args.model
    lines = ["| `memory=` | seconds, with loading | peak, GiB |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = str(build_untrained_model(Path(folder) / "untrained"))
        for mode in MEMORY_MODES:
            keys = [f"model={model}", "prompts=[a, b, c]", f"memory={mode}", "num_inference_steps=2"]
            started = time.perf_counter()
            done = _run(["-c", GENERATE, "generate", *keys, f"save_path={folder}/{mode}"])
            seconds = f"{time.perf_counter() - started:.1f}"
            cells = (seconds, done.stdout.splitlines()[-1]) if done.returncode == 0 else (_reason(done), "-")
            lines.append(f"| `{mode}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def attention(args: argparse.Namespace) -> str:
    """Grouped attention against the dense mask and repeated keys, by benchmarks/attention.py."""
    sizes = ["--text", "16", "--video", "64", "--heads", "2"] if args.tiny else ["--video", "17550", "--heads", "48"]
    return _benchmark(
        "attention.py", [*sizes, "--dtype", "bfloat16", "--device", DEVICE.type, "--runs", str(args.runs)]
    )


def extension(args: argparse.Namespace) -> str:
    """Extension with the context cache, by benchmarks/extension.py."""
    tiny = ["--steps", "2", "--batch", "1", "--layers", "1"]
    full = ["--dtype", "bfloat16", "--batch", "1", "--heads", "48", "--text", "226", "--latents", "13", "60", "90"]
    sizes = tiny if args.tiny else full
    return _benchmark("extension.py", [*sizes, "--device", DEVICE.type, "--runs", str(args.runs)])


def training(args: argparse.Namespace) -> str:
    """Training steps, by benchmarks/training.py."""
    return _benchmark("training.py", ["--height", "64", "--width", "96", "--frames", "9"] if args.tiny else [])


GENERATE = """
import sys, torch
from mask2dit.cli import main
status = main(sys.argv[1:])
print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if torch.cuda.is_available() else "-")
sys.exit(status)
"""
"""`mask2dit` that prints the peak of the GPU's memory in GiB at the end."""


PARTS = {part.__name__: part for part in (backends, attention, extension, modes, steps, training)}
README_PARTS = ("steps", "modes")


def _run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def _reason(done: subprocess.CompletedProcess) -> str:
    return f"failed: {next(reversed(done.stderr.strip().splitlines()), 'no message')[:200]}"


def _benchmark(name: str, arguments: list[str]) -> str:
    done = _run([f"benchmarks/{name}", *arguments])
    return f"```\n{done.stdout.strip()}\n```" if done.returncode == 0 else _reason(done)


def report(results: dict[str, str], with_heads: bool = True) -> str:
    """The GPU part of a page: the device, and each part's description and table, each under a head of its own or not."""
    card = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else "no GPU: the CPU, which measures nothing of interest"
    )
    lines = [f"On {card}, torch {torch.__version__}, by `bash benchmarks/gpu.sh`:"]
    for name, result in results.items():
        heads = ["", f"### {name}"] if with_heads else []
        lines += [*heads, "", " ".join(PARTS[name].__doc__.split()), "", result]
    return "\n".join(lines)


def write_pages(args: argparse.Namespace, results: dict[str, str]) -> None:
    """Writes the GPU parts of the page of results and of the README."""
    of_readme = {name: result for name, result in results.items() if name in README_PARTS}
    for page, part in ((args.output, report(results)), (args.readme, report(of_readme, with_heads=False))):
        if page == args.output or of_readme:
            write_text(page, replace_part(page.read_text(encoding="utf-8"), "GPU", part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="model for the memory modes; a small untrained one if not given")
    parser.add_argument("--tiny", action="store_true", help="small sizes, also for a CPU")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="page of results; by default benchmarks/RESULTS.md")
    parser.add_argument("--readme", type=Path, help="by default README.md")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)  # a part in its own process
    args = parser.parse_args()
    if args.only:
        print(PARTS[args.only](args))
        return
    if args.tiny and not (args.output and args.readme):
        parser.error("small sizes measure nothing of interest: name pages of your own by --output and --readme")
    args.output = args.output or ROOT / "benchmarks/RESULTS.md"
    args.readme = args.readme or ROOT / "README.md"
    for page in (args.output, args.readme):
        if "<!-- begin GPU -->" not in (page.read_text(encoding="utf-8") if page.is_file() else ""):
            parser.error(
                f"{page} has no place for the GPU part: add the lines <!-- begin GPU --> and <!-- end GPU -->"
            )
    results = {}
    for name in args.parts:
        print(f"{name} …", file=sys.stderr)
        arguments = ["--only", name, "--runs", str(args.runs), *(["--tiny"] if args.tiny else [])]
        done = _run([__file__, *arguments, *(["--model", args.model] if args.model else [])])
        results[name] = done.stdout.strip() if done.returncode == 0 else _reason(done)
        write_pages(args, results)  # after each part, so that none is lost
    print(report(results))


if __name__ == "__main__":
    main()
