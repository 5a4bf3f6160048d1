"""The files of a cache and their index, which says where each entry lies without opening a file.

An entry is one tensor: the latents of a frame range, or the embeddings of a caption. Files are safetensors named by a digest
of their keys; their metadata holds what the index needs, so that it can always be made again. `index.npy` is a sorted array
that is mapped into memory: it opens in the same time for any number of entries.

Processes that write at the same time never lock. Each writes its own files and then updates the index until it covers every
file that it sees. Whoever does so last sees all files, so the last index covers them.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mask2dit.files import atomic_path
from mask2dit.hashing import digest
from mask2dit.texts import parse_json

KINDS = ("latents", "text")
REMEDY = "remove it and make it again with mask2dit cache"
ENTRY = np.dtype(
    [
        ("key", "<u8"),
        ("kind", "<u4"),  # index into KINDS
        ("crc", "<u4"),  # CRC-32 of the tensor's bytes
        ("file", "<u8"),  # the digest in the file's name
        ("offset", "<u8"),  # of the tensor in the file
        ("video_size", "<u8"),  # bytes of the clip's video file; 0 for captions
    ]
)
PARTS = ENTRY.names or ()


def entry_key(kind: str, name: str, variant: int = 0) -> int:
    """The key of an entry: the frame range `variant` of the clip of this name, or a caption."""
    text = f"{kind} {variant} {name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class CacheIndex:
    """The index of a cache, opened on its first use, in every process by itself.

    Args:
        folder: the cache.

    Raises:
        FileNotFoundError, ValueError: if it is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def entries(self) -> np.ndarray:
        path = self.folder / "index.npy"
        try:
            entries = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing: mask2dit cache makes it again from the cache's files"
            ) from None
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
        if entries.dtype != ENTRY:
            raise ValueError(f"{path} is damaged (its fields are {entries.dtype.names}): {REMEDY}")
        return entries

    def __getstate__(self) -> dict:
        return {"folder": self.folder}  # a mapped array would be copied

    def find(self, key: int) -> np.void | None:
        """The entry of a key; None if there is none. Reads a few pages of the index."""
        keys = self.entries["key"]
        position = bisect_left(keys, key)
        return self.entries[position] if position < len(keys) and keys[position] == key else None

    def has(self, keys: Iterable[int], count: int) -> np.ndarray:
        """True for each of `count` keys that has an entry."""
        wanted = np.fromiter(keys, np.uint64, count)
        known = np.ascontiguousarray(self.entries["key"])
        positions = np.searchsorted(known, wanted)
        found = np.zeros(count, bool)
        inside = positions < len(known)
        found[inside] = known[positions[inside]] == wanted[inside]
        return found

    def read(self, entry: np.void, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Reads an entry's tensor and compares its checksum.

        Raises:
            FileNotFoundError, ValueError: if its file is missing or damaged.
        """
        path = file_path(self.folder, int(entry["kind"]), int(entry["file"]))
        buffer = bytearray(int(np.prod(shape)) * dtype.itemsize)
        try:
            with path.open("rb", buffering=0) as file:
                num_read = os.preadv(file.fileno(), [buffer], int(entry["offset"]))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: mask2dit cache makes it again") from None
        if num_read != len(buffer) or zlib.crc32(buffer) != entry["crc"]:
            reason = "it ends too early" if num_read != len(buffer) else "a checksum differs"
            raise ValueError(f"{path} is damaged ({reason}): {REMEDY}")
        return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))


def file_path(folder: Path, kind: int, number: int) -> Path:
    return folder / f"{KINDS[kind]}-{number:016x}.safetensors"


def write_entries(
    folder: Path, kind: str, tensors: Mapping[int, torch.Tensor], video_sizes: Mapping[int, int], settings: dict
) -> None:
    """Writes a file of entries, atomically. Files of one name have the same content in every run.

    Args:
        folder: the cache.
        kind: latents or text.
        tensors: the tensor of each entry, by key.
        video_sizes: bytes of the clip's video file, by key.
        settings: the settings of the cache.
    """
    if not tensors:
        return
    names = {key: f"{key:016x}" for key in tensors}
    entries = {
        names[key]: [zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()), video_sizes.get(key, 0)]
        for key, tensor in tensors.items()
    }
    # A single entry, since safetensors writes several in arbitrary order.
    metadata = {"contents": json.dumps({"settings": digest(settings), "entries": entries})}
    with atomic_path(folder / f"{kind}-{digest(sorted(names.values()))}.safetensors") as temporary:
        save_file({names[key]: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)


def update_index(folder: Path, settings: dict) -> CacheIndex:
    """Brings the index in step with the files: adds those that it lacks, and removes those that are gone.

    Only files that are new to the index are opened.

    Raises:
        ValueError: if the index or a new file is damaged, or a file belongs to a cache of other settings.
    """
    path = folder / "index.npy"
    while True:
        entries = CacheIndex(folder).entries if path.exists() else np.zeros(0, ENTRY)
        pairs = entries[["kind", "file"]]
        known = {tuple(pair) for pair in np.unique(pairs).tolist()}
        present = _present(folder)
        new = sorted(present - known)
        if not new and known <= present and path.exists():
            return CacheIndex(folder)
        gone = np.array(sorted(known - present), pairs.dtype)
        kept = entries[~np.isin(pairs, gone)] if len(gone) else entries
        merged = np.concatenate([kept, *(_entries_of(folder, *file, settings) for file in new)])
        merged.sort(order=("key", "kind", "file"))
        with atomic_path(path) as temporary:
            np.save(temporary, merged)


def _present(folder: Path) -> set[tuple[int, int]]:
    """Kind and number of each file of the cache."""
    found = set()
    with os.scandir(folder) as files:
        for file in files:
            kind, _, number = file.name.removesuffix(".safetensors").partition("-")
            if kind in KINDS and file.name.endswith(".safetensors"):
                found.add((KINDS.index(kind), int(number, 16)))
    return found


def _entries_of(folder: Path, kind: int, number: int, settings: dict) -> np.ndarray:
    """The entries of a file, from its header."""
    path = file_path(folder, kind, number)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > (size := path.stat().st_size):
                raise ValueError("its header ends too early")
            header = parse_json(file.read(length).decode())
        contents = parse_json(header.pop("__metadata__")["contents"])
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
        if contents["settings"] != digest(settings):
            raise ForeignFileError(
                f"{str(path)!r} does not belong to this cache, but to one of other settings: remove it"
            )
        entries = np.zeros(len(header), ENTRY)
        for entry, (name, tensor) in zip(entries, header.items()):
            crc, video_size = contents["entries"][name]
            values = int(name, 16), kind, crc, number, 8 + length + tensor["data_offsets"][0], video_size
            for part, value in zip(PARTS, values):
                entry[part] = value
    except ForeignFileError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
    return entries


class ForeignFileError(ValueError):
    """A file belongs to a cache of other settings."""
