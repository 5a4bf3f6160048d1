"""Latents and text embeddings computed ahead: `python -m mask2dit.data.cache [CONFIG.yaml] [key=value …]`.

The folder holds `index.json` with all settings that the tensors depend on, `latents-*.safetensors` with the mean and the
log-variance of each frame range of each clip, `text-*.safetensors` with the embeddings of each caption, and `failed.jsonl`
with the clips that could not be read. Files are written atomically; a later run computes only what is missing.

Shapes: F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene, D text width.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from mask2dit import cli
from mask2dit.config import parse_shard
from mask2dit.data.clips import Clip, UnreadableClipError, is_long_enough, read_clip
from mask2dit.data.config import CacheConfig, DataConfig
from mask2dit.data.encoding import encode_caption, encode_clip, load_encoders
from mask2dit.data.manifests import read_manifest
from mask2dit.data.quarantine import Quarantine
from mask2dit.device import choose_device
from mask2dit.files import atomic_path, check_writable, open_tensors, read_json, write_text
from mask2dit.hashing import digest, fingerprint
from mask2dit.models.hub import local_model
from mask2dit.pipelines.mask2dit import VAE_REMEDY, Mask2DiTPipeline, require_finite
from mask2dit.provenance import describe_changes

logger = logging.getLogger(__name__)

# Items per file: larger files lose more work at an interruption, smaller ones are more numerous. One range of 49 frames at
# 480x720 takes 4.5 MB in bfloat16, one caption 1.9 MB.
CLIPS_A_FILE = 32
CAPTIONS_A_FILE = 64
REMEDY = "remove it and make it again with python -m mask2dit.data.cache"


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
                f"there is no cache in {str(self.folder)!r}: make it with python -m mask2dit.data.cache, or set cache=null"
            )
        found = read_json(index, REMEDY)
        if changes := describe_changes(found, settings):
            raise ValueError(
                f"the cache {str(self.folder)!r} is stale, since it was made with other settings: {changes}; make another "
                "with python -m mask2dit.data.cache, or go back to those"
            )
        self._files: dict[str, Path] = {}  # by key of clip or caption
        self._sizes: dict[str, int] = {}  # bytes of each clip's video file
        for file in sorted([*self.folder.glob("latents-*.safetensors"), *self.folder.glob("text-*.safetensors")]):
            contents = _contents(file)
            if contents["settings"] != digest(settings):
                raise ValueError(
                    f"{str(file)!r} does not belong to this cache, but to one of other settings: remove it"
                )
            self._files |= dict.fromkeys(contents["keys"], file)
            self._sizes |= contents["sizes"]

    def missing_clips(self, clips: Iterable[Clip]) -> list[Clip]:
        """The clips that are not in the cache, without duplicates."""
        return [clip for clip in {clip.name: clip for clip in clips}.values() if _clip_key(clip) not in self._files]

    def missing_captions(self, captions: Iterable[str]) -> list[str]:
        """The captions that are not in the cache, without duplicates."""
        return [caption for caption in dict.fromkeys(captions) if _caption_key(caption) not in self._files]

    def check(self, clips: Sequence[Clip]) -> None:
        """Raises `ValueError` unless all clips (or their failures) and captions are in the cache and no video file has
        changed since. Video files that were deleted are not needed."""
        failed = self._failed()
        missing = [clip for clip in self.missing_clips(clips) if clip.name not in failed]
        captions = self.missing_captions(clip.caption for clip in clips)
        if missing or captions:
            example = f", such as {missing[0].label} ({missing[0].name})" if missing else ""
            raise ValueError(
                f"the cache {str(self.folder)!r} is not complete: {len(missing)} clips{example} and {len(captions)} captions "
                "are missing; run python -m mask2dit.data.cache again; it computes only what is missing"
            )
        changed = [clip for clip in clips if self._has_changed(clip)]
        if changed:
            raise ValueError(
                f"the cache {str(self.folder)!r} is stale: {len(changed)} video files have changed since, such as "
                f"{changed[0].path} ({changed[0].label}); make another with python -m mask2dit.data.cache"
            )

    def latents(self, clip: Clip, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of one frame range of a clip, (F, C, h, w) each, unscaled.

        Raises:
            UnreadableClipError: if the clip could not be read when the cache was made.
        """
        key = _clip_key(clip)
        if key not in self._files:
            raise UnreadableClipError(self._failed()[clip.name])
        with open_tensors(self._files[key], REMEDY) as file:
            return file.get_tensor(f"{key}.{variant}.mean"), file.get_tensor(f"{key}.{variant}.logvar")

    def embeddings(self, caption: str) -> torch.Tensor:
        """The embeddings of a caption, (L, D). The empty caption is cached too, for classifier-free guidance."""
        key = _caption_key(caption)
        with open_tensors(self._files[key], REMEDY) as file:
            return file.get_tensor(key)

    def _failed(self) -> dict[str, str]:
        return Quarantine(self.folder / "failed.jsonl", 0, 1.0).reasons()

    def _has_changed(self, clip: Clip) -> bool:
        size = self._sizes.get(_clip_key(clip))
        return size is not None and clip.path.is_file() and clip.path.stat().st_size != size


def cache_settings(
    data: DataConfig,
    model: str | os.PathLike,
    dtype: str,
    skeleton: Mask2DiTPipeline,
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
    skeleton.video_shape(data.height, data.width, data.num_frames, data.num_scenes)
    return {
        **{f"{part} weights": fingerprint(Path(model) / part) for part in ("vae", "text_encoder", "tokenizer")},
        "text_length": skeleton.transformer.config.max_text_seq_length,
        "dtype": dtype,
        **({"variant": variant} if variant else {}),  # caches made before there were variants stay valid
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
    device = choose_device(config.device)
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
    missing_clips = {clip.name for clip in cache.missing_clips(clips)}
    missing_captions = set(cache.missing_captions(captions))

    index, count = parse_shard(config.shard)
    # Split before finished items are removed, so that processes that start at different times agree on their parts.
    clip_files = _chunks(clips, CLIPS_A_FILE)[index::count]
    caption_files = _chunks(captions, CAPTIONS_A_FILE)[index::count]
    clip_files = [[clip for clip in chunk if clip.name in missing_clips] for chunk in clip_files]
    caption_files = [[caption for caption in chunk if caption in missing_captions] for chunk in caption_files]
    num_clips, num_captions = sum(map(len, clip_files)), sum(map(len, caption_files))
    if not num_clips and not num_captions:
        logger.info("Nothing is missing in part %s of %s", config.shard, folder)
        return

    pipe = load_encoders(config.model, getattr(torch, config.dtype), device, skeleton, config.variant)
    with tqdm(total=num_captions, desc="captions", unit="caption") as progress:
        for chunk in caption_files:
            tensors = {}
            for caption in chunk:
                tensors[_caption_key(caption)] = encode_caption(pipe, caption).cpu()
                require_finite(f"the embeddings of {caption!r}", tensors[_caption_key(caption)], "use another dtype")
                progress.update()
            _write(folder, "text", tensors, list(tensors), {}, settings)

    failed = Quarantine(folder / "failed.jsonl", len(clips), config.data.max_quarantined_share)
    num_failed = 0
    with tqdm(total=num_clips, desc="clips", unit="clip") as progress:
        for chunk in clip_files:
            tensors, sizes = {}, {}
            for clip in chunk:
                progress.update()
                try:
                    windows = [read_clip(config.data, clip, variant) for variant in range(config.data.num_windows)]
                except UnreadableClipError as error:
                    failed.add(clip, error)
                    num_failed += 1
                    continue
                key = _clip_key(clip)
                sizes[key] = clip.path.stat().st_size
                for variant, pixels in enumerate(windows):
                    mean, logvar = encode_clip(pipe.vae, pixels)
                    for name, values in (("mean", mean), ("logvar", logvar)):
                        require_finite(f"the latents of {clip.name} ({clip.label})", values, VAE_REMEDY)
                        tensors[f"{key}.{variant}.{name}"] = values.cpu()
            _write(folder, "latents", tensors, list(sizes), sizes, settings)
    logger.info(
        "Wrote %d clips and %d captions to %s; %d clips could not be read",
        num_clips - num_failed,
        num_captions,
        folder,
        num_failed,
    )


def _write(
    folder: Path, name: str, tensors: dict[str, torch.Tensor], keys: list[str], sizes: dict[str, int], settings: dict
) -> None:
    """Writes a file named by a digest of its keys, so that files of one name have the same content in every run."""
    if not tensors:
        return
    # A single entry, since safetensors writes several in arbitrary order.
    metadata = {"contents": json.dumps({"settings": digest(settings), "keys": keys, "sizes": sizes})}
    with atomic_path(folder / f"{name}-{digest(sorted(keys))}.safetensors") as temporary:
        save_file(tensors, temporary, metadata)


def _contents(file: Path) -> dict:
    """The metadata that `_write` stored in a file, without reading its tensors."""
    with open_tensors(file, REMEDY) as opened:
        return json.loads(opened.metadata()["contents"])


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _clip_key(clip: Clip) -> str:
    return digest(["clip", clip.name])


def _caption_key(caption: str) -> str:
    return digest(["caption", caption])


def main(arguments: Sequence[str]) -> int:
    return cli.run("cache", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
