"""Latents and text embeddings computed ahead: `mask2dit cache [CONFIG.yaml] [key=value …]`.

The folder holds `index.json` with all settings that the tensors depend on, `latents-*.safetensors` with the mean and the
log-variance of each frame range of each clip, `text-*.safetensors` with the embeddings of each caption, `index.npy` with
where each of them lies, and `failed.jsonl` with the clips that could not be read. Files are written atomically; a later run
computes only what is missing.

Shapes: F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene, D text width.
"""

import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from mask2dit import cli
from mask2dit.config import parse_shard
from mask2dit.data.cache_index import REMEDY, CacheIndex, entry_key, update_index, write_entries
from mask2dit.data.clips import Clip, UnreadableClipError, is_long_enough, read_clip
from mask2dit.data.config import CacheConfig, DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.data.quarantine import Quarantine
from mask2dit.device import choose_device
from mask2dit.engine.config import resolve_shard
from mask2dit.engine.open import open_engine
from mask2dit.engine.share import Workers, in_batches
from mask2dit.files import check_writable, read_json, write_text
from mask2dit.hashing import fingerprint
from mask2dit.pipelines.prompt_cache import text_settings
from mask2dit.provenance import describe_changes

# What imports diffusers is imported by the functions that need it: readers of a cache do not, nor does --help.
if TYPE_CHECKING:
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

logger = logging.getLogger(__name__)

FORMAT = 2  # of the files
DERIVED = ("latent_shape", "text_shape")  # settings that follow from others
MIB = 2**20
MAX_COMPARED = 1000  # video files whose size is compared before training


class LatentCache:
    """Reads a cache.

    Args:
        folder: the cache.
        settings: the settings it must have been made with, see `cache_settings`.

    Raises:
        FileNotFoundError: if there is no cache.
        ValueError: if it was made with other settings, naming those that differ, or one of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"there is no cache in {str(self.folder)!r}: make it with mask2dit cache, or set cache=null"
            )
        found = read_json(index, REMEDY)
        if found.get("format") != FORMAT:
            raise ValueError(
                f"the cache {str(self.folder)!r} was made by an earlier version, in a format that is no longer read: remove "
                "the folder and make it again with mask2dit cache"
            )
        if changes := describe_changes(found, settings, ignore=DERIVED):
            raise ValueError(
                f"the cache {str(self.folder)!r} is stale, since it was made with other settings: {changes}; make another "
                "with mask2dit cache, or go back to those"
            )
        self.settings = settings
        self.index = CacheIndex(self.folder)

    def missing_clips(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips that are not in the cache, without duplicates."""
        # The frame ranges of a clip are in one file, so the first stands for all.
        found = self.index.has((entry_key("latents", clip.name) for clip in clips), len(clips))
        return list({clips[i].name: clips[i] for i in np.flatnonzero(~found)}.values())

    def missing_captions(self, captions: Sequence[str]) -> list[str]:
        """The captions that are not in the cache, without duplicates."""
        found = self.index.has((entry_key("text", caption) for caption in captions), len(captions))
        return list(dict.fromkeys(captions[i] for i in np.flatnonzero(~found)))

    def check(self, clips: Sequence[Clip]) -> None:
        """Raises `ValueError` unless all clips (or their failures) and captions are in the cache and no video file has
        changed since. Sizes of up to `MAX_COMPARED` video files, evenly chosen, are compared; deleted ones are not needed."""
        missing, captions = self.missing_clips(clips), self.missing_captions([clip.caption for clip in clips])
        if missing:
            failed = self._failed()
            missing = [clip for clip in missing if clip.name not in failed]
        if missing or captions:
            example = f", such as {missing[0].label} ({missing[0].name})" if missing else ""
            raise ValueError(
                f"the cache {str(self.folder)!r} is not complete: {len(missing)} clips{example} and {len(captions)} captions "
                "are missing; run mask2dit cache again, which computes only what is missing"
            )
        compared = np.unique(np.linspace(0, len(clips) - 1, min(len(clips), MAX_COMPARED)).astype(int))
        self.check_videos([clips[i] for i in compared])

    def check_videos(self, clips: Sequence[Clip]) -> None:
        """Raises `ValueError` if video files have another size than when they were encoded. Looks at each file."""
        with ThreadPoolExecutor(16) as pool:  # a network's storage takes as long for one as for several
            changed = [clip for clip, differs in zip(clips, pool.map(self._has_changed, clips)) if differs]
        if changed:
            raise ValueError(
                f"the cache {str(self.folder)!r} is stale: {len(changed)} video files have changed since, such as "
                f"{changed[0].path} ({changed[0].label}); make another with mask2dit cache"
            )

    def latents(self, clip: Clip, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of one frame range of a clip, (F, C, h, w) each, unscaled.

        Raises:
            UnreadableClipError: if the clip could not be read when the cache was made.
            FileNotFoundError, ValueError: if a file of the cache is missing or damaged.
        """
        entry = self.index.find(entry_key("latents", clip.name, variant))
        if entry is None:
            raise UnreadableClipError(self._failed()[clip.name])
        mean, logvar = self.index.read(entry, self.settings["latent_shape"], self._dtype)
        return mean, logvar

    def embeddings(self, caption: str) -> torch.Tensor:
        """The embeddings of a caption, (L, D). The empty caption is cached too, for classifier-free guidance.

        Raises:
            KeyError: if it is not in the cache.
            FileNotFoundError, ValueError: if a file of the cache is missing or damaged.
        """
        entry = self.index.find(entry_key("text", caption))
        if entry is None:
            raise KeyError(caption)
        return self.index.read(entry, self.settings["text_shape"], self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.settings["dtype"])

    def _failed(self) -> dict[str, str]:
        return Quarantine(self.folder / "failed.jsonl", 0, 1.0).reasons()

    def _has_changed(self, clip: Clip) -> bool:
        entry = self.index.find(entry_key("latents", clip.name))
        try:
            return entry is not None and os.stat(clip.path).st_size != entry["video_size"]
        except FileNotFoundError:
            return False


def cache_settings(
    data: DataConfig,
    model: str | os.PathLike,
    dtype: str,
    skeleton: "Mask2DiTPipeline",
    variant: str | None = None,
) -> dict:
    """All settings that latents and embeddings depend on, besides the clips and captions themselves.

    Args:
        data: the configuration of the clips.
        model: the model's folder, whose encoders are fingerprinted.
        dtype: the data type of the encoders.
        skeleton: `Mask2DiTPipeline.skeleton` of that folder.
        variant: the variant of the encoders' weights.

    Raises:
        ValueError: if the model does not support videos of this size.
    """
    shape = skeleton.video_shape(data.height, data.width, data.num_frames, data.num_scenes)
    _, height, width = shape.latent_size
    config = skeleton.transformer.config
    return {
        "format": FORMAT,
        "vae weights": fingerprint(Path(model) / "vae"),
        **text_settings(model, dtype, config.max_text_seq_length, variant),
        "latent_shape": [2, shape.latent_frames[0], skeleton.vae.config.latent_channels, height, width],
        "text_shape": [config.max_text_seq_length, config.text_embed_dim],
        **{
            key: getattr(data, key)
            for key in ("kind", "num_frames", "height", "width", "max_stride", "num_windows", "seed")
        },
    }


def build_cache(config: CacheConfig) -> None:
    """Computes what is missing in this process's part of a cache, and logs the result.

    Raises:
        FileNotFoundError, ValueError, OSError: if a setting cannot be carried out; raised before weights are read.
        QuarantineError: if too many clips cannot be read.
    """
    from mask2dit.models.hub import local_model
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

    if config.engine == "local":  # the nodes of a cluster may have other devices than this machine
        choose_device(config.device)
    config = replace(config, shard=resolve_shard(config))
    config = local_model(config)
    skeleton = Mask2DiTPipeline.skeleton(config.model, variant=config.variant)
    settings = cache_settings(config.data, config.model, config.dtype, skeleton, config.variant)
    # Includes rows that are too short for a sample, since the cache serves any num_scenes.
    listed = [clip for row in read_manifest(config.data) for clip in row if is_long_enough(clip, config.data)]
    clips = list({clip.name: clip for clip in listed}.values())
    captions = list(dict.fromkeys(["", *(clip.caption for clip in listed)]))

    folder = Path(config.data.cache)
    check_writable(folder)
    if not (folder / "index.json").is_file():
        write_text(folder / "index.json", json.dumps(settings, indent=2) + "\n")
    cache = LatentCache(folder, settings)
    cache.index = update_index(folder, settings)
    cache.check_videos(clips)
    files = _missing_files(config, cache, clips, captions)
    if not files:
        logger.info("Nothing is missing in part %s of %s", config.shard, folder)
        return

    process = partial(_encode, folder=folder, data=config.data, settings=settings, num_clips=len(clips))
    load = partial(_load_encoders, config.model, config.dtype, config.device, skeleton, config.variant)
    written: Counter = Counter()
    with (
        open_engine(config) as engine,
        closing(engine.run("encode", process, files, Workers(load=load, uses_gpu=True))) as done,
        tqdm(total=sum(len(file.items) for file in files), desc="encode", unit="item") as progress,
    ):
        for counts in done:
            written += counts
            progress.update(counts.total())
    update_index(folder, settings)
    logger.info(
        "Wrote %d clips and %d captions to %s; %d clips could not be read",
        written["latents"],
        written["text"],
        folder,
        written["failed"],
    )


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file to write."""

    kind: str
    items: list[Clip] | list[str]
    """Clips for latents, captions for text."""

    @property
    def name(self) -> str:
        first = self.items[0]
        return f"the {self.kind} from {first.label if isinstance(first, Clip) else repr(first)}"


def _missing_files(config: CacheConfig, cache: LatentCache, clips: list[Clip], captions: list[str]) -> list[_File]:
    """The files that this process has to write, captions first. Files of a part of a cache are the same in every run."""
    index, count = parse_shard(config.shard)
    missing_clips = {clip.name for clip in cache.missing_clips(clips)}
    missing_captions = set(cache.missing_captions(captions))
    itemsize = getattr(torch, config.dtype).itemsize
    clip_bytes = config.data.num_windows * math.prod(cache.settings["latent_shape"]) * itemsize
    caption_bytes = math.prod(cache.settings["text_shape"]) * itemsize

    def of_size(items: list, item_bytes: int) -> list[list]:
        # Split before finished items are removed, so that processes that start at different times agree on their parts.
        return in_batches(items, max(1, int(config.file_size * MIB / item_bytes)))[index::count]

    files = [
        _File(kind="text", items=[caption for caption in chunk if caption in missing_captions])
        for chunk in of_size(captions, caption_bytes)
    ] + [
        _File(kind="latents", items=[clip for clip in chunk if clip.name in missing_clips])
        for chunk in of_size(clips, clip_bytes)
    ]
    return [file for file in files if file.items]


def _load_encoders(
    model: str, dtype: str, device: str, skeleton: "Mask2DiTPipeline", variant: str | None
) -> "Mask2DiTPipeline":
    from mask2dit.data.encoding import load_encoders

    return load_encoders(model, getattr(torch, dtype), choose_device(device), skeleton, variant)


def _encode(
    files: Iterable[_File], pipe: "Mask2DiTPipeline", folder: Path, data: DataConfig, settings: dict, num_clips: int
) -> Iterator[Counter]:
    """Writes files. Yields for each how many entries of its kind were written, and how many clips failed."""
    failed = Quarantine(folder / "failed.jsonl", num_clips, data.max_quarantined_share)
    for file in files:
        if file.kind == "text":
            yield _encode_captions(file.items, pipe, folder, settings)
        else:
            yield _encode_clips(file.items, pipe, folder, data, settings, failed)


def _encode_captions(captions: list[str], pipe: "Mask2DiTPipeline", folder: Path, settings: dict) -> Counter:
    from mask2dit.data.encoding import encode_caption
    from mask2dit.pipelines.mask2dit import require_finite

    tensors = {}
    for caption in captions:
        values = encode_caption(pipe, caption).cpu()
        require_finite(f"the embeddings of {caption!r}", values, "use another dtype")
        tensors[entry_key("text", caption)] = values
    write_entries(folder, "text", tensors, {}, settings)
    return Counter(text=len(captions))


def _encode_clips(
    clips: list[Clip], pipe: "Mask2DiTPipeline", folder: Path, data: DataConfig, settings: dict, failed: Quarantine
) -> Counter:
    from mask2dit.data.encoding import encode_clip
    from mask2dit.pipelines.mask2dit import VAE_REMEDY, require_finite

    tensors, sizes, counts = {}, {}, Counter()
    for clip in clips:
        try:
            windows = [read_clip(data, clip, variant) for variant in range(data.num_windows)]
        except UnreadableClipError as error:
            failed.add(clip, error)
            counts["failed"] += 1
            continue
        counts["latents"] += 1
        size = clip.path.stat().st_size
        for variant, pixels in enumerate(windows):
            values = torch.stack(encode_clip(pipe.vae, pixels)).cpu()
            require_finite(f"the latents of {clip.name} ({clip.label})", values, VAE_REMEDY)
            key = entry_key("latents", clip.name, variant)
            tensors[key], sizes[key] = values, size
    write_entries(folder, "latents", tensors, sizes, settings)
    return counts


def main(arguments: Sequence[str]) -> int:
    return cli.run("cache", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
