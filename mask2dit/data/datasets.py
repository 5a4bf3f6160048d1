"""Datasets: a sample is a pure function of the configuration, the manifest and a position, in every process and run.

Shapes: B samples, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene,
D text width.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain

import torch
from torch.utils.data import Dataset

from mask2dit.data.cache import LatentCache, cache_settings
from mask2dit.data.clips import (
    Clip,
    UnreadableClipError,
    is_long_enough,
    read_clip,
    required_frames,
    scene_windows,
    window_variant,
)
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import check_command, read_manifest
from mask2dit.data.order import Position, sample_order
from mask2dit.data.quarantine import Quarantine
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.randomness import generator_for

logger = logging.getLogger(__name__)

# Maximum number of replacements for an unreadable sample. Few clips may be broken, so more in a row indicate a defect.
MAX_REPLACEMENTS = 10


class StoryDataset(Dataset, ABC):
    """Base of both datasets: reads the clips of a position and replaces samples that cannot be read.

    A clip that cannot be read is tried again (`max_retries`). Then it is listed in the quarantine, and its sample is replaced
    by another, which is also a function of the position. `Quarantine` describes when that ends the run.

    Args:
        config: the configuration of the clips.
        quarantine: the file that lists clips that could not be read.
        cache: latents and embeddings computed ahead, read in place of the videos.

    Raises:
        FileNotFoundError, ValueError: if the manifest is missing or faulty, there are too few clips, or some are
            missing in the cache.
    """

    _num_items: int

    def __init__(self, config: DataConfig, quarantine: str | os.PathLike, cache: LatentCache | None = None):
        self.config = config
        self.cache = cache
        self._orders: dict[int, torch.Tensor] = {}
        clips = self._take(read_manifest(config))
        if cache is not None:
            cache.check(clips)
        self.quarantine = Quarantine(quarantine, len({clip.name for clip in clips}), config.max_quarantined_share)

    @abstractmethod
    def _take(self, rows: list[list[Clip]]) -> list[Clip]:
        """Keeps the usable clips or rows, sets `_num_items`, and returns the clips that may occur in a sample."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples per epoch."""

    @abstractmethod
    def _choose(self, epoch: int, position: int, broken: list[str]) -> list[Clip] | None:
        """The clips of a sample. If `broken` names clips that could not be read: the clips of a replacement without them,
        or None if there is none."""

    def __getitem__(self, position: Position) -> dict:
        """The sample at (epoch, position).

        Returns:
            pixels: `float32 (S, num_frames, 3, height, width)` in [-1, 1]; or, from a cache,
            latent_mean, latent_logvar: (S, F, C, h, w), unscaled, and prompt_embeds: (S, L, D);
            captions: S texts;
            epoch, position: as requested;
            names: S texts with the row and file of each clip, for messages;
            replaced: number of unreadable samples that this one replaces.

        Raises:
            IndexError: if the position is not in `0 … len(self) - 1`.
            QuarantineError: if too many clips cannot be read.
            ValueError: if no replacement can be found.
        """
        epoch, position = position
        if not 0 <= position < len(self):
            raise IndexError(f"an epoch has samples 0 to {len(self) - 1}, but sample {position} was asked for")
        variant = window_variant(self.config, epoch)
        broken: list[str] = []
        while len(broken) <= MAX_REPLACEMENTS:
            clips = self._choose(epoch, position, broken)
            if clips is None:
                break
            scenes = []
            for clip in clips:
                try:
                    scenes.append(self._read(clip, variant))
                except UnreadableClipError as error:
                    self.quarantine.add(clip, error, epoch=epoch, position=position)
                    broken.append(clip.name)
                    break
            else:
                return {
                    **{name: torch.stack([scene[name] for scene in scenes]) for name in scenes[0]},
                    "captions": [clip.caption for clip in clips],
                    "epoch": epoch,
                    "position": position,
                    "names": [f"{clip.label} ({clip.path})" for clip in clips],
                    "replaced": len(broken),
                }
        raise ValueError(
            f"sample {position} of epoch {epoch} and {len(broken) - 1} replacements of it could not be read; "
            f"{self.quarantine.path} lists why: repair these clips or take them out of the manifest"
        )

    def _read(self, clip: Clip, variant: int) -> dict[str, torch.Tensor]:
        if self.cache is None:
            return {"pixels": read_clip(self.config, clip, variant)}
        mean, logvar = self.cache.latents(clip, variant)
        return {"latent_mean": mean, "latent_logvar": logvar, "prompt_embeds": self.cache.embeddings(clip.caption)}

    def _order(self, epoch: int) -> torch.Tensor:
        # Cached, since a permutation of a million clips takes a while.
        if epoch not in self._orders:
            self._orders = {epoch: sample_order(self._num_items, self.config.seed, epoch)}
        return self._orders[epoch]


class PretrainDataset(StoryDataset):
    """Samples of `num_scenes` random different clips: different files, or different frame ranges of a file.

    An epoch takes every clip once, except for a remainder of fewer than `num_scenes`. Where a clip that is listed more than
    once would occur twice in a sample, another clip replaces the second occurrence.
    """

    def _take(self, rows: list[list[Clip]]) -> list[Clip]:
        listed = [clip for row in rows for clip in row]
        self._clips = [clip for clip in listed if is_long_enough(clip, self.config)]
        self._num_items = len(self._clips)
        _log_left_out("clips", "they are too short", len(listed), len(self._clips), self.config)
        num_different = len(_different(self._clips, self.config.num_scenes))
        if num_different < self.config.num_scenes:
            raise ValueError(
                f"{self.config.manifest} has {num_different} clips of at least {required_frames(self.config)} frames, "
                f"but a sample takes num_scenes={self.config.num_scenes} different ones"
            )
        return self._clips

    def __len__(self) -> int:
        return len(self._clips) // self.config.num_scenes

    def _choose(self, epoch: int, position: int, broken: list[str]) -> list[Clip] | None:
        n = self.config.num_scenes
        clips: list[Clip] = []
        if not broken:
            in_order = [self._clips[i] for i in self._order(epoch)[position * n : (position + 1) * n]]
            clips = _different(in_order, n)
        if len(clips) < n:
            rest = [clip for clip in self._clips if clip.name not in broken]
            generator = generator_for(self.config.seed, "replacement", epoch, position, len(broken))
            others = (rest[i] for i in torch.randperm(len(rest), generator=generator).tolist())
            clips = _different(chain(clips, others), n)
        return clips if len(clips) == n else None


class FineTuneDataset(StoryDataset):
    """Samples of `num_scenes` consecutive scenes from a random position in a row. An epoch takes every row once."""

    def _take(self, rows: list[list[Clip]]) -> list[Clip]:
        # Each entry lists the possible samples of a row.
        self._rows = [windows for row in rows if (windows := scene_windows(row, self.config))]
        self._num_items = len(self._rows)
        _log_left_out("rows", "they have too few or too short scenes", len(rows), len(self._rows), self.config)
        if len(self) < 1:
            raise ValueError(
                f"{self.config.manifest} has no row with num_scenes={self.config.num_scenes} consecutive scenes of at least "
                f"{required_frames(self.config)} frames"
            )
        return [clip for windows in self._rows for window in windows for clip in window]

    def __len__(self) -> int:
        return len(self._rows)

    def _choose(self, epoch: int, position: int, broken: list[str]) -> list[Clip] | None:
        generator = generator_for(self.config.seed, "sample", epoch, position, len(broken))
        if not broken:
            windows = self._rows[self._order(epoch)[position]]
        else:
            rest = [[w for w in windows if not any(clip.name in broken for clip in w)] for windows in self._rows]
            rest = [windows for windows in rest if windows]
            if not rest:
                return None
            windows = rest[_draw(len(rest), generator)]
        return windows[_draw(len(windows), generator)]


def build_dataset(
    config: DataConfig,
    quarantine: str | os.PathLike,
    model: str | os.PathLike,
    dtype: str,
    skeleton: Mask2DiTPipeline | None = None,
    variant: str | None = None,
) -> PretrainDataset | FineTuneDataset:
    """The dataset of a configuration, which reads the cache if `config.cache` names one.

    Args:
        config: the configuration of the clips.
        quarantine: the file that lists clips that could not be read.
        model: the folder whose VAE and text encoder training uses; a cache must be made with the same.
        dtype: their data type: float32, bfloat16 or float16.
        skeleton: `Mask2DiTPipeline.skeleton` of the folder. None: it is built here if a cache is read.
        variant: the variant of their weights.

    Raises:
        FileNotFoundError, ValueError: as the datasets and `LatentCache` raise them.
    """
    cache = None
    if config.cache is not None:
        skeleton = skeleton or Mask2DiTPipeline.skeleton(model, variant=variant)
        cache = LatentCache(config.cache, cache_settings(config, model, dtype, skeleton, variant))
    return {"pretrain": PretrainDataset, "finetune": FineTuneDataset}[config.kind](config, quarantine, cache)


def collate(samples: list[dict]) -> dict:
    """A batch: tensors stacked, (B, …); everything else as lists with one entry per sample."""
    return {
        name: torch.stack([sample[name] for sample in samples])
        if isinstance(samples[0][name], torch.Tensor)
        else [sample[name] for sample in samples]
        for name in samples[0]
    }


def _different(clips: Iterable[Clip], count: int) -> list[Clip]:
    """The first `count` different clips; two paths to one file count as the same."""
    found: dict[tuple, Clip] = {}
    for clip in clips:
        found.setdefault(clip.frames, clip)
        if len(found) == count:
            break
    return list(found.values())


def _draw(count: int, generator: torch.Generator) -> int:
    """A random number of 0 … count - 1."""
    return int(torch.randint(count, (1,), generator=generator))


def _log_left_out(what: str, reason: str, listed: int, kept: int, config: DataConfig) -> None:
    if kept < listed:
        logger.warning(
            "%s: %d of %d %s are left out, since by the manifest's account %s; %s lists them",
            config.manifest,
            listed - kept,
            listed,
            what,
            reason,
            check_command(config),
        )
