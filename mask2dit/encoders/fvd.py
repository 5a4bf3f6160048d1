"""Video features for Fréchet distances: VideoMAE-v2 (arXiv 2303.16727) and I3D (arXiv 1705.07750).

Parameter names are those of the weights in use for FVD, so that these load unchanged.
Shapes: B clips, T frames, N tokens, D width.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from mask2dit.encoders.weights import load_weights

NUM_FRAMES = 16
RESOLUTION = 224


class VideoMAE(nn.Module):
    """VideoMAE-v2's fine-tuned vision transformer; the defaults are ViT-g, whose features content-debiased FVD uses.

    Args:
        width, depth, heads, hidden: sizes of the transformer; `hidden` is the inner width of its perceptrons.
        patch_size: height and width of a patch, which is 2 frames deep.
        resolution, num_frames: size of a clip.
        num_classes: outputs of the head, which is part of the weights but not used for features.
    """

    def __init__(
        self,
        width=1408,
        depth=40,
        heads=16,
        hidden=6144,
        patch_size=14,
        resolution=224,
        num_frames=16,
        num_classes=174,
    ):
        super().__init__()
        size = (2, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, size, stride=size)})
        self.blocks = nn.ModuleList(VideoMAEBlock(width, heads, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self.num_tokens = (num_frames // 2) * (resolution // patch_size) ** 2
        self.width = width

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) in [0, 1] to (B, D)."""
        x = rearrange(self.patch_embed["proj"](video), "b d t h w -> b (t h w) d")
        x = x + sinusoids(self.num_tokens, self.width).to(x)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))


class VideoMAEBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VideoMAEAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VideoMAEAttention(nn.Module):
    """Self-attention whose keys have no bias."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = rearrange(
            F.linear(x, self.qkv.weight, bias), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Sinusoidal positions (length, width): sines at even channels, cosines at odd ones."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class I3D(nn.Module):
    """Inception-v1 inflated to 3D and trained on Kinetics-400; FVD takes its logits.

    Args:
        num_classes: number of logits.
    """

    MIXED = {
        "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
        "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
        "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
        "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
        "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
        "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
        "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
        "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
        "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
    }

    def __init__(self, num_classes: int = 400):
        super().__init__()
        self.Conv3d_1a_7x7 = I3DUnit(3, 64, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = I3DUnit(64, 64)
        self.Conv3d_2c_3x3 = I3DUnit(64, 192, (3, 3, 3))
        for name, (width, widths) in self.MIXED.items():
            setattr(self, name, I3DMixed(width, widths))
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, num_classes, 1)})

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, 224, 224) in [-1, 1] to logits (B, classes), averaged over time."""
        x = max_pool_same(self.Conv3d_1a_7x7(video), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in self.MIXED:
            if name == "Mixed_4b":
                x = max_pool_same(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = max_pool_same(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits["conv3d"](x).mean(dim=(2, 3, 4))


class I3DUnit(nn.Module):
    def __init__(self, width_in, width_out, size=(1, 1, 1), stride=(1, 1, 1)):
        super().__init__()
        self.conv3d = nn.Conv3d(width_in, width_out, size, stride, bias=False)
        self.bn = nn.BatchNorm3d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class I3DMixed(nn.Module):
    def __init__(self, width, widths):
        super().__init__()
        self.b0 = I3DUnit(width, widths[0])
        self.b1a = I3DUnit(width, widths[1])
        self.b1b = I3DUnit(widths[1], widths[2], (3, 3, 3))
        self.b2a = I3DUnit(width, widths[3])
        self.b2b = I3DUnit(widths[3], widths[4], (3, 3, 3))
        self.b3b = I3DUnit(width, widths[5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


def pad_same(x: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Pads with zeros like "same" in TensorFlow, from which these weights come."""
    padding: list[int] = []
    for length, kernel, step in reversed(list(zip(x.shape[2:], size, stride))):
        total = max(kernel - (step if length % step == 0 else length % step), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def max_pool_same(x: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return F.max_pool3d(pad_same(x, size, stride), size, stride)


class FeatureExtractor:
    """A model with its preprocessing: clips of 16 frames, stretched to 224 x 224.

    Args:
        model: takes batches of such clips.
        value_range: lowest and highest pixel value that the model takes.
    """

    def __init__(self, model: nn.Module, value_range: tuple[float, float], device: torch.device):
        self.model = model.eval().requires_grad_(False).to(device)
        self.low, self.high = value_range
        self.device = device

    @torch.inference_mode()
    def __call__(self, clips: list[torch.Tensor]) -> np.ndarray:
        """`uint8 (16, H, W, 3)` each to features (B, D) in float64."""
        x = torch.stack([self._prepare(clip) for clip in clips])
        return self.model(x).double().cpu().numpy()

    def _prepare(self, clip: torch.Tensor) -> torch.Tensor:
        x = rearrange(clip, "t h w c -> t c h w").to(self.device).float() / 255
        x = F.interpolate(x, (RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False)
        return rearrange(x * (self.high - self.low) + self.low, "t c h w -> c t h w")


def load_extractor(name: str, path: str | os.PathLike, device: torch.device) -> FeatureExtractor:
    """An extractor from the user's weights.

    Args:
        name: videomae or i3d.
        path: file of the weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds other weights.
    """
    model_class, value_range = {"videomae": (VideoMAE, (0.0, 1.0)), "i3d": (I3D, (-1.0, 1.0))}[name]
    weights = load_weights(path, "model", "module")
    with torch.device("meta"):
        model = model_class()
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).split("\n")[-1].strip()
        raise ValueError(f"{str(path)!r} does not hold the weights of {model_class.__name__}: {reason}") from error
    return FeatureExtractor(model, value_range, device)
