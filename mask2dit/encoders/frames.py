"""Features of frames by models of transformers, as in VBench (arXiv 2311.17982), and LAION's aesthetic heads on them.

Shapes: T frames, E embedding.
"""

import os
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from mask2dit.encoders.viclip import CLIP, IMAGENET
from mask2dit.encoders.weights import load_weights


class FrameEncoder:
    """CLIP's image tower or DINO, from a folder saved by transformers.

    Raises:
        ValueError: if the folder does not hold such a model.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device):
        from transformers import AutoModel, CLIPModel  # takes seconds, which processes without this model are spared

        try:
            self.model = AutoModel.from_pretrained(folder).eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{str(folder)!r} does not hold a model of transformers: {error}") from error
        self.is_clip = isinstance(self.model, CLIPModel)
        self.resolution = getattr(self.model.config, "vision_config", self.model.config).image_size
        self.device = device

    @torch.inference_mode()
    def __call__(self, frames: torch.Tensor) -> np.ndarray:
        """`uint8 (T, H, W, 3)` to features of length 1, `(T, E)`: CLIP's projection, or DINO's class token."""
        x = rearrange(frames, "t h w c -> t c h w").to(self.device).float()
        scale = self.resolution / min(x.shape[2:])
        size = [max(self.resolution, round(side * scale)) for side in x.shape[2:]]
        # DINO takes the whole frame, CLIP its centre, as in VBench.
        size = size if self.is_clip else [self.resolution] * 2
        mode = "bicubic" if self.is_clip else "bilinear"
        x = F.interpolate(x, size, mode=mode, antialias=True).clamp(0, 255) / 255
        top, left = ((side - self.resolution) // 2 for side in size)
        x = x[:, :, top : top + self.resolution, left : left + self.resolution]
        mean, std = (
            torch.tensor(values, device=x.device).view(3, 1, 1) for values in (CLIP if self.is_clip else IMAGENET)
        )
        pixels = (x - mean) / std
        if self.is_clip:
            features = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        else:
            features = self.model(pixels).last_hidden_state[:, 0]
        return F.normalize(features.float(), dim=-1).cpu().numpy()


def load_aesthetic_head(path: str | os.PathLike) -> nn.Sequential:
    """LAION's linear head, or the perceptron of the improved aesthetic predictor, distinguished by the names of the weights.

    Raises:
        ValueError: if the file holds neither.
    """
    weights = load_weights(path)
    if weights.keys() == {"weight", "bias"}:
        weights = {f"layers.0.{name}": value for name, value in weights.items()}
    sizes = {name: tuple(weights[name].shape) for name in weights if name.endswith(".weight")}
    # The published perceptron has dropout between its linear layers, which are therefore numbered 0, 2, 4, 6 and 7.
    layers = nn.Sequential()
    for i in range(1 + max((int(name.split(".")[1]) for name in sizes if name.startswith("layers.")), default=-1)):
        shape = sizes.get(f"layers.{i}.weight")
        layers.append(nn.Linear(shape[1], shape[0]) if shape and len(shape) == 2 else nn.Identity())
    head = nn.Sequential(OrderedDict(layers=layers))
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is not one of LAION's aesthetic heads: fetch it again") from error
    return head.eval().requires_grad_(False)
