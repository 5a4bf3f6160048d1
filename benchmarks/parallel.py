"""A pass of the transformer on several processes, compared with one process: bytes exchanged, time per step and results.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --processes 8 --heads 48 --layers 42 --height 480 --width 720 --frames 49 --dtype bfloat16
    python benchmarks/parallel.py --processes 4 --cfg 2
    python benchmarks/parallel.py --predict

A step is a forward pass ("denoise", with guidance if --cfg 2) or a forward and a backward pass ("train"). Runs of one process
and of all alternate. Bytes are those that a process sends to others, counted at the exchange. On a CPU, processes compete for
its cores and memory, so that the ratio shows the overhead and not what GPUs gain. With --predict, nothing runs: tables for
the published size are computed.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.flop_counter import FlopCounterMode

from mask2dit import Mask2DiTTransformer3DModel, SceneLayout
from mask2dit.models import parallel
from mask2dit.models.parallel import apply_ulysses, gather_branches

GB = 1e9
TEXT_LENGTH = 226
RATE = 400e12  # FLOP per second that a card is assumed to reach, 40% of an H100's peak in 16 bits
SPEEDS = (300, 50, 25)  # GB per second that a card is assumed to send: NVLink, 400 Gbit/s InfiniBand, PCIe 4.0 x16


class Counter:
    """Counts the bytes that this process sends to others, by replacing the exchange."""

    def __init__(self):
        self.sent = 0
        self._exchange = parallel._exchange
        parallel._exchange = self

    def remove(self) -> None:
        parallel._exchange = self._exchange

    def __call__(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        self.sent += tensor.numel() * tensor.element_size() * (group.size() - 1) // group.size()
        return self._exchange(tensor, group)


def build(options: argparse.Namespace, device: torch.device) -> Mask2DiTTransformer3DModel:
    torch.manual_seed(0)
    transformer = Mask2DiTTransformer3DModel(
        num_attention_heads=options.heads,
        num_layers=options.layers,
        sample_height=options.height // 8,
        sample_width=options.width // 8,
        sample_frames=options.frames,
        use_rotary_positional_embeddings=True,
        mask_variant=options.variant,
    )
    if options.checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.to(device, getattr(torch, options.dtype))


def inputs(options: argparse.Namespace, batch_size: int, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, options.dtype)
    frames = (options.frames - 1) // 4 + 1
    size = (batch_size, options.scenes * frames, 16, options.height // 8, options.width // 8)
    latents = torch.randn(size, generator=generator)
    text = torch.randn(batch_size, options.scenes * TEXT_LENGTH, 4096, generator=generator)
    return {
        "hidden_states": latents.to(device, dtype),
        "encoder_hidden_states": text.to(device, dtype),
        "timestep": torch.full((batch_size,), 500, device=device),
    }


def step(transformer, arguments: dict, train: bool, guidance: dist.ProcessGroup | None) -> torch.Tensor:
    """A forward pass, and a backward pass in training. Returns the output."""
    if train:
        transformer.zero_grad()
        sample = transformer(**arguments).sample
        sample.float().square().mean().backward()
        return sample.detach()
    with torch.no_grad():
        if guidance is not None:
            branch = guidance.rank()
            arguments = {name: tensor[branch : branch + 1] for name, tensor in arguments.items()}
        sample = transformer(**arguments).sample
        return sample if guidance is None else gather_branches(sample, guidance)


def timed(function, device: torch.device) -> tuple[float, torch.Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def measure(rank: int, options: argparse.Namespace, store: str) -> None:
    """Runs all steps on one of the processes. Rank 0 prints the results."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.processes,
    )
    shape = (options.cfg, options.processes // options.cfg)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("cfg", "ulysses"))
    guidance = mesh.get_group("cfg") if options.cfg > 1 else None
    ulysses = mesh.get_group("ulysses") if shape[1] > 1 else None
    transformer, arguments = build(options, device), inputs(options, options.cfg, device)
    counter = Counter()
    if rank == 0:
        print(
            f"{'step':10}{'one process (s)':>17}{'together (s)':>14}{'ratio (min-max)':>20}{'MB sent':>10}{'difference':>12}"
        )
    for name in ("denoise",) if options.cfg > 1 else ("denoise", "train"):
        alone, together, error = [], [], 0.0
        for run in range(options.runs + 1):
            apply_ulysses(transformer, None)
            dist.barrier()
            expected = None
            if rank == 0:
                seconds, expected = timed(partial(step, transformer, arguments, name == "train", None), device)
                alone.append(seconds)
            apply_ulysses(transformer, ulysses)
            dist.barrier()
            counter.sent = 0
            seconds, sample = timed(partial(step, transformer, arguments, name == "train", guidance), device)
            together.append(seconds)
            if rank == 0:
                error = float((sample - expected).abs().max() / expected.abs().max())
            if run == 0:
                alone, together = [], []  # the first run warms up
        if rank == 0:
            ratios = [mine / base for mine, base in zip(together, alone)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            # Autograd makes an exchange in the backward pass for each one in the forward passes, unseen by the counter;
            # checkpointing repeats the forward pass, which the counter sees.
            passes = 1 if name == "denoise" else (1.5 if options.checkpointing else 2)
            print(
                f"{name:10}{statistics.median(alone):17.3f}{statistics.median(together):14.3f}{spread:>20}"
                f"{passes * counter.sent / 1e6:10.1f}{error:12.1e}"
            )
    dist.destroy_process_group()


def exchanged_bytes(layout: SceneLayout, width: int, layers: int, processes: int, itemsize: int = 2) -> float:
    """Bytes that each process sends in the layers of a forward pass: of its share's queries, keys, values and outputs."""
    own = sum(-(-length // processes) for length in layout.text_lengths + layout.video_lengths)
    return layers * 4 * own * width * itemsize * (processes - 1) / processes


def forward_flops(transformer: Mask2DiTTransformer3DModel, scenes: int) -> int:
    """Floating-point operations of a forward pass at 480x720x49 per scene, as torch counts them on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents, text = torch.empty(1, scenes * 13, 16, 60, 90), torch.empty(1, scenes * TEXT_LENGTH, 4096)
        transformer(latents, text, torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def predict() -> None:
    """Prints tables for CogVideoX-5B's transformer at 480x720x49: 42 layers of 48 heads x 64."""
    width, layers, cards = 3072, 42, (1, 2, 4, 8)
    with torch.device("meta"):
        transformer = Mask2DiTTransformer3DModel(
            num_attention_heads=48, num_layers=layers, use_rotary_positional_embeddings=True
        )
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{parameters / GB:.2f}e9 parameters, bf16, GB are 1e9 bytes. Everything is computed, nothing is measured.")
    layouts = {n: SceneLayout((TEXT_LENGTH,) * n, (13 * 30 * 45,) * n) for n in (3, 8)}
    own = {
        (scenes, n): sum(-(-length // n) for length in layout.text_lengths + layout.video_lengths)
        for scenes, layout in layouts.items()
        for n in cards
    }
    sent = {(scenes, n): exchanged_bytes(layouts[scenes], width, layers, n) for scenes, n in own}

    print("\n| scenes | cards | tokens per card | inference, GB | training with ZeRO-2, GB |\n|---|---|---|---|---|")
    for (scenes, n), tokens in own.items():
        whole = 2 * width * layouts[scenes].length  # the embedded sequence before it is divided
        # Inference: weights and, of the share, hidden states, normed ones, and queries, keys and values sent, received and
        # joined, and the attention's output.
        inference = 2 * parameters + whole + 2 * width * (2 + 10) * tokens
        # Training: the n cards share a sample. Every block is checkpointed and keeps two inputs of a width; one is recomputed
        # at 34 bytes per token and channel (`mask2dit.training.memory`), with keys and values copied for each scene's call.
        states = 2 * parameters + (2 + 12) * parameters / n
        training = states + whole + tokens * width * (2 * 2 * layers + 34 + 4 * scenes)
        print(f"| {scenes} | {n} | {tokens:,} | {inference / GB:.0f} | {training / GB:.0f} |")

    print(
        f"\n| scenes | cards | PFLOP per card | at {RATE / 1e12:.0f} TFLOP/s, s | GB sent per layer | per pass | "
        + " | ".join(f"at {speed} GB/s, s" for speed in SPEEDS)
        + " |\n|---|---|---|---|---|---|"
        + "---|" * len(SPEEDS)
    )
    for scenes in layouts:
        flops = forward_flops(transformer, scenes)
        for n in cards[1:]:
            gigabytes = sent[scenes, n] / GB
            times = " | ".join(f"{gigabytes / speed:.2f}" for speed in SPEEDS)
            print(
                f"| {scenes} | {n} | {flops / n / 1e15:.2f} | {flops / n / RATE:.2f} | {gigabytes / layers:.2f} | "
                f"{gigabytes:.1f} | {times} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cfg", type=int, default=1, choices=[1, 2], help="processes over which guidance is divided")
    parser.add_argument("--heads", type=int, default=4, help="of 64 channels each")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--frames", type=int, default=17, help="per scene")
    parser.add_argument("--variant", default="v2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="checkpoint every block in training")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--predict", action="store_true", help="print tables for the published size")
    options = parser.parse_args()
    if options.predict:
        predict()
        return
    if options.processes % options.cfg:
        parser.error(f"--cfg {options.cfg} does not divide --processes {options.processes}")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        multiprocessing.spawn(measure, (options, store), nprocs=options.processes)


if __name__ == "__main__":
    main()
