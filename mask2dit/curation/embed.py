"""ViCLIP features of clips and captions, by the evaluation's implementation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from mask2dit.curation.store import Entry
from mask2dit.curation.write import Clip
from mask2dit.device import choose_device
from mask2dit.encoders.clip_tokenizer import ViCLIPTokenizer, load_clip_tokenizer
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.encoders.features import normalise
from mask2dit.encoders.untrained import UNTRAINED, build_untrained_viclip
from mask2dit.encoders.viclip import load_viclip, preprocess
from mask2dit.files import atomic_path, open_tensors
from mask2dit.hashing import digest, fingerprint
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import VideoReader

PRINTS = " prints"


@dataclass(frozen=True, kw_only=True)
class Features(Entry):
    """Features of the clip with the same id."""

    path: str
    """Safetensors file, relative to the output folder. It holds the features under the id, (E,), with norm 1, and the prints
    of the same frames under the id and `PRINTS`, (F, 192); see `frame_prints`."""


class Embedder:
    """ViCLIP with its tokenizer.

    Args:
        config: its weights.
        device: name of the device, see `choose_device`.

    Raises:
        FileNotFoundError, ValueError: if there are no weights, or they are not ViCLIP's.
    """

    def __init__(self, config: ViCLIPConfig, device: str):
        self.device = choose_device(device)
        self.model = load_viclip(config.weights).to(self.device)
        tokenizer = load_clip_tokenizer(Path(config.weights).parent)
        self.tokenizer = ViCLIPTokenizer(tokenizer, self.model.context_length)
        self.preprocessing = config.preprocessing

    @torch.inference_mode()
    def videos(self, readers: Iterable[VideoReader]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Features of videos, (B, E), with norm 1, and the prints of their frames."""
        videos, prints = [], []
        for reader in readers:
            frames = reader.read(middle_frames(0, reader.num_frames, self.model.num_frames))
            videos.append(preprocess(frames, self.model.input_resolution, self.preprocessing))
            prints.append(frame_prints(frames))
        features = self.model.encode_video(torch.stack(videos).to(self.device)).float().cpu().numpy()
        return normalise(features), prints

    @torch.inference_mode()
    def text(self, text: str) -> np.ndarray:
        """Features of a text, (C, E), with norm 1: one per chunk, since captions exceed the model's context."""
        return normalise(self.model.encode_text(self.tokenizer.chunks(text).to(self.device)).float().cpu().numpy())


def frame_prints(frames: torch.Tensor) -> np.ndarray:
    """Prints of frames `uint8 (F, H, W, 3)`: `float16 (F, 192)` with norm 1, or 0 for blank frames."""
    small = F.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).float(), (8, 8)).flatten(1)
    small = small - small.mean(dim=1, keepdim=True)
    is_blank = small.std(dim=1, keepdim=True) < 4
    return torch.where(is_blank, 0.0, F.normalize(small)).to(torch.float16).numpy()


def embed_settings(config: ViCLIPConfig) -> dict:
    """The settings that features depend on. Builds an untrained ViCLIP if the configuration asks for one.

    Raises:
        FileNotFoundError: if there are no weights.
    """
    weights = Path(config.weights)
    if config.build_untrained and weights.name.startswith(UNTRAINED):
        build_untrained_viclip(weights)
    if not weights.is_file():
        raise FileNotFoundError(
            f"there are no weights of ViCLIP at {config.weights!r}: docs/evaluation.md says where to get them"
        )
    return {"viclip": fingerprint(weights), "preprocessing": config.preprocessing, "prints": 1}


def embed(clips: Iterable[Clip], embedder: Embedder, folder: Path, batch_size: int, settings: dict) -> Iterator:
    """Embeds clips and writes one file of features per batch below `folder` / features."""
    (folder / "features").mkdir(exist_ok=True)
    clips = iter(clips)
    while batch := list(islice(clips, batch_size)):
        features, prints = embedder.videos(clip.open(folder) for clip in batch)
        # The name depends on the settings, so that features of other weights are not overwritten.
        path = folder / "features" / f"{digest([settings, *(clip.key for clip in batch)])}.safetensors"
        with atomic_path(path) as temporary:
            tensors = {clip.id: feature for clip, feature in zip(batch, features.astype(np.float32))}
            save_file(tensors | {clip.id + PRINTS: of_clip for clip, of_clip in zip(batch, prints)}, temporary)
        for clip in batch:
            yield clip, [Features(id=clip.id, source=clip.source, path=path.relative_to(folder).as_posix())]


def read_features(features: Sequence[Features], folder: Path) -> np.ndarray:
    """The features (B, E) of clips.

    Raises:
        FileNotFoundError, ValueError: if their files are missing or damaged.
    """
    return _read(features, folder, "")


def read_prints(features: Sequence[Features], folder: Path) -> np.ndarray:
    """The prints (B, F, 192) of clips' frames.

    Raises:
        FileNotFoundError, ValueError: if their files are missing or damaged.
    """
    return _read(features, folder, PRINTS)


def _read(features: Sequence[Features], folder: Path, what: str) -> np.ndarray:
    by_path: dict[str, list[int]] = {}
    for i, entry in enumerate(features):
        by_path.setdefault(entry.path, []).append(i)
    found: dict[int, np.ndarray] = {}
    for path, indices in by_path.items():
        with open_tensors(folder / path, f"delete embed*.jsonl in {folder} and run again", "np") as file:
            found |= {i: file.get_tensor(features[i].id + what) for i in indices}
    return np.stack([found[i] for i in range(len(features))])
