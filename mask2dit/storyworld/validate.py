"""Does the measurement read rendered stories right? `python -m mask2dit.storyworld.validate [CONFIG.yaml] [key=value …]`.

Rendered stories are measured as they are, or blurred and noisy, or after a VAE. It prints the share of everything that
captions name that is read as drawn, consistency within stories and between unrelated ones, and the mean differences between
unrelated stories, which are `measure.UNRELATED`.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mask2dit.command import run_command
from mask2dit.config import check_choice
from mask2dit.storyworld.measure import differences, measure_scene, measure_story, visual_consistency
from mask2dit.storyworld.render import render_scene, render_story
from mask2dit.storyworld.world import SPLITS, caption, describe, sample_story, with_new_identity


@dataclass(kw_only=True)
class ValidateConfig:
    """Which stories are measured, and what is done to them before."""

    num_stories: int = 500
    """Number of stories."""
    seed: int = 0
    """Seed of the first story; the others follow."""
    split: str = "train"
    """Split of the stories: train or held_out."""
    num_scenes: int = 3
    """Scenes per story."""
    num_frames: int = 9
    """Frames per scene."""
    height: int = 64
    """Height in pixels."""
    width: int = 64
    """Width in pixels."""

    blur: float = 0.0
    """Standard deviation of a Gaussian blur in pixels."""
    noise: float = 0.0
    """Standard deviation of noise, in levels of 0 to 255."""
    vae: str | None = None
    """Folder with a VAE in diffusers' layout that reconstructs the scenes before they are measured; null: none."""

    def __post_init__(self):
        if self.num_stories < 1 or self.num_scenes < 2:
            raise ValueError(
                f"num_stories={self.num_stories} has to be at least 1 and num_scenes={self.num_scenes} at least 2"
            )
        check_choice("split", self.split, SPLITS)
        if self.blur < 0 or self.noise < 0:
            raise ValueError(f"blur={self.blur} and noise={self.noise} have to be 0 or more")


def validate(config: ValidateConfig) -> dict:
    """Measures the stories, and prints and returns what comes out.

    Returns:
        right: the share that is read as drawn, of each kind of thing that captions name and of "all" of them;
        scenes_right: of scenes, all of which is;
        cuts_right: of stories with cuts where scenes begin and nowhere else;
        consistency, lowest_consistency: within stories, the mean and the lowest;
        unrelated_consistency: the mean between scenes with one caption of unrelated stories;
        unrelated: the mean difference between these in each part of identity.
    """
    size = (config.num_frames, config.height, config.width)
    degrade, rng = _degradation(config), np.random.default_rng(config.seed)
    right, parts = defaultdict(list), defaultdict(list)
    scenes_right, cuts_right, within, unrelated = [], [], [], []
    for seed in tqdm(range(config.seed, config.seed + config.num_stories), unit="story", disable=None):
        story = sample_story(seed, config.num_scenes, config.split)
        captions = [caption(story, k) for k in range(config.num_scenes)]
        video = np.concatenate([degrade(scene, rng) for scene in render_story(story, *size)])
        measured = measure_story(video, captions)
        for scene in measured.scenes:
            scenes_right.append(scene.all_right)
            for kind, values in scene.right.items():
                right[kind] += values
        cuts_right.append(measured.cuts_right)
        within.append(measured.consistency.overall)
        # One scene is enough: the others of a story have the same identity.
        other = degrade(render_scene(with_new_identity(story, seed), 0, *size), rng)
        pair = measured.scenes[0], measure_scene(other, describe(story, 0))
        unrelated.append(visual_consistency(pair).overall)
        for part, values in differences(*pair).items():
            parts[part] += values
    right["all"] = [value for values in right.values() for value in values]
    result = {
        "right": {kind: float(np.mean(values)) for kind, values in right.items()},
        "scenes_right": float(np.mean(scenes_right)),
        "cuts_right": float(np.mean(cuts_right)),
        "consistency": float(np.mean(within)),
        "lowest_consistency": float(np.min(within)),
        "unrelated_consistency": float(np.mean(unrelated)),
        "unrelated": {part: float(np.mean(values)) for part, values in parts.items()},
    }
    print(json.dumps(result, indent=2))
    return result


def _degradation(config: ValidateConfig) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    through_vae = _reconstruction(config.vae) if config.vae is not None else None

    def degrade(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if through_vae is not None:
            video = through_vae(video)
        if config.blur or config.noise:
            video = _blur(video.astype(np.float32), config.blur) + config.noise * rng.standard_normal(video.shape)
        return np.rint(np.clip(video, 0, 255)).astype(np.uint8)

    return degrade


def _blur(video: np.ndarray, sigma: float) -> np.ndarray:
    """Each frame of (F, H, W, 3) with a Gaussian of this standard deviation in pixels."""
    if not sigma:
        return video
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        margin = [(reach, reach) if k == axis else (0, 0) for k in range(4)]
        padded = np.pad(video, margin, mode="edge")
        video = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis) @ kernel
    return video


def _reconstruction(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """What becomes of `uint8 (F, H, W, 3)` in a VAE, as floats from 0 to 255."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(folder).float().eval()

    @torch.no_grad()
    def reconstruct(video: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return (decoded[0].permute(1, 2, 3, 0).numpy() + 1) * 127.5

    return reconstruct


if __name__ == "__main__":
    sys.exit(run_command(ValidateConfig, "mask2dit.storyworld.validate:validate", None, sys.argv[1:]))
