"""How a cache of latents opens and reads, by its number of entries.

Small tensors stand in for latents and embeddings, so that a hundred thousand entries fit a disk: half of the entries are
latents of clips, half embeddings of captions. Caches of each size are written, and then

- opened and checked against the list of clips, with the pages of their files dropped from memory (cold);
- read at random by one process, cold and again (warm), and by four workers of a DataLoader (warm).

The baseline opens every file for its header, as caches without an index need it.

    python benchmarks/cache.py
    python benchmarks/cache.py --entries 1000 1000000 --reads 2000 --file-size 64
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from mask2dit.data.cache import MIB, LatentCache
from mask2dit.data.cache_index import entry_key, update_index, write_entries
from mask2dit.data.clips import Clip
from mask2dit.engine.share import in_batches
from mask2dit.reporting.tables import markdown_table

LATENT_SHAPE, TEXT_SHAPE = [2, 2, 4, 4, 4], [4, 32]
SETTINGS = {"format": 2, "dtype": "bfloat16", "latent_shape": LATENT_SHAPE, "text_shape": TEXT_SHAPE}


class Samples(Dataset):
    """One clip per sample: its latents and the embeddings of its caption."""

    def __init__(self, cache: LatentCache, clips: list[Clip]):
        self.cache, self.clips = cache, clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        clip = self.clips[index]
        return *self.cache.latents(clip, 0), self.cache.embeddings(clip.caption)


def write(folder: Path, clips: list[Clip], file_size: float) -> None:
    """Writes a cache of random tensors."""
    (folder / "index.json").write_text(json.dumps(SETTINGS))
    for kind, shape in (("latents", LATENT_SHAPE), ("text", TEXT_SHAPE)):
        item_bytes = 2 * torch.Size(shape).numel()
        for batch in in_batches(clips, max(1, int(file_size * MIB / item_bytes))):
            values = torch.randn(len(batch), *shape, dtype=torch.bfloat16)
            names = (clip.name if kind == "latents" else clip.caption for clip in batch)
            write_entries(folder, kind, {entry_key(kind, name): x for name, x in zip(names, values)}, {}, SETTINGS)


def forget(folder: Path) -> None:
    """Drops the files' pages from the system's cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(call, folder: Path, repeats: int, is_cold: bool) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        if is_cold:
            forget(folder)
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def open_all(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            file.metadata()


def random_reads(clips: list[Clip], reads: int) -> Iterator[Clip]:
    generator = torch.Generator().manual_seed(0)
    yield from (clips[i] for i in torch.randint(len(clips), (reads,), generator=generator).tolist())


def measure(folder: Path, num_entries: int, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    clips = [
        Clip(root=folder, file=f"clips/{i:07d}.mp4", caption=f"Clip {i}.", row=i + 1) for i in range(num_entries // 2)
    ]
    write(folder, clips, options.file_size)
    indexing = seconds(lambda: update_index(folder, SETTINGS), folder, 1, True)
    files = len(list(folder.glob("*.safetensors")))
    size = (folder / "index.npy").stat().st_size
    opening = seconds(lambda: LatentCache(folder, SETTINGS).index.find(0), folder, options.repeats, True)
    every_header = seconds(lambda: open_all(folder), folder, options.repeats, True)
    cache = LatentCache(folder, SETTINGS)
    checking = seconds(lambda: cache.check(clips), folder, options.repeats, False)

    samples = Samples(cache, list(random_reads(clips, options.reads)))
    rates = []
    for is_cold in (True, False):
        rates.append(options.reads / seconds(lambda: [samples[i] for i in range(len(samples))], folder, 1, is_cold))
    loader = DataLoader(samples, batch_size=16, num_workers=4, persistent_workers=True)
    for _ in loader:  # starts the workers
        pass
    rates.append(options.reads / seconds(lambda: [batch for batch in loader], folder, options.repeats, False))
    return [
        f"{num_entries:,}",
        str(files),
        f"{size / 1024:,.1f}",
        f"{indexing:.2f}",
        f"{1000 * opening:.1f}",
        f"{1000 * every_header:.1f}",
        f"{1e6 * checking / len(clips):.1f}",
        *(f"{rate:,.0f}" for rate in rates),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10, 1_000, 100_000])
    parser.add_argument("--reads", type=int, default=2_000, help="samples to read")
    parser.add_argument(
        "--file-size", type=float, default=0.25, help="MiB; 0.25 gives as many files as 4.5 MB latents do"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for num_entries in options.entries:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), num_entries, options))
    heads = [
        "entries",
        "files",
        "index, KiB",
        "indexing, s",
        "opening, ms",
        "every header, ms",
        "check per clip, µs",
        "samples/s, cold",
        "warm",
        "four workers",
    ]
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
