"""ViCLIP: video and text features in one space (InternVid, arXiv 2307.06942).

Parameter names are those of the public weights, so that these load unchanged.
Shapes: B videos or texts, T frames, P patches per frame, L tokens, D width, E embedding.
"""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from mask2dit.encoders.config import PREPROCESSING
from mask2dit.encoders.weights import load_weights
from mask2dit.files import open_tensors

# Mean and standard deviation of the pixels, in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class ViCLIP(nn.Module):
    """A CLIP text encoder and a vision transformer that attends over all patches of all frames at once.

    Args:
        input_resolution: height and width of a frame in pixels.
        patch_size: height and width of a patch.
        vision_width, vision_layers, vision_heads: sizes of the vision transformer.
        embed_dim: E, the width of the features.
        vocab_size: entries of the tokenizer; the largest token id ends a text.
        text_width, text_heads, text_layers: sizes of the text transformer.
        context_length: L, the tokens per text.
        num_frames: T, the frames per video.
    """

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        vision_width: int,
        vision_layers: int,
        vision_heads: int,
        embed_dim: int,
        vocab_size: int,
        text_width: int,
        text_heads: int,
        text_layers: int,
        context_length: int = 32,
        num_frames: int = 8,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.context_length = context_length
        self.num_frames = num_frames
        self.vision_encoder = VisionEncoder(
            input_resolution, patch_size, vision_width, vision_layers, vision_heads, embed_dim, num_frames
        )
        self.text_encoder = TextEncoder(vocab_size, text_width, text_layers, text_heads, embed_dim, context_length)
        self.temp = nn.Parameter(torch.ones(1))  # temperature of the contrastive loss; the features do not use it

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        """Preprocessed videos (B, 3, T, H, W) to features (B, E), not normalised.

        Raises:
            ValueError: if the number of frames or their size is not the model's.
        """
        wanted = (3, self.num_frames, self.input_resolution, self.input_resolution)
        if video.ndim != 5 or tuple(video.shape[1:]) != wanted:
            raise ValueError(f"a video has to be (B, {', '.join(map(str, wanted))}), but is {tuple(video.shape)}")
        return self.vision_encoder(video)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), padded with 0 after the end token, to features (B, E), not normalised.

        Raises:
            ValueError: if the number of tokens is not the model's.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.context_length:
            raise ValueError(f"tokens have to be (B, {self.context_length}), but are {tuple(tokens.shape)}")
        return self.text_encoder(tokens)


class VisionEncoder(nn.Module):
    def __init__(self, resolution, patch_size, width, layers, heads, embed_dim, num_frames):
        super().__init__()
        num_patches = (resolution // patch_size) ** 2
        size = (1, patch_size, patch_size)
        self.conv1 = nn.Conv3d(3, width, size, stride=size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_patches + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, num_frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x = rearrange(self.conv1(video), "b d t h w -> b t (h w) d")
        x = x + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        # One class token for the whole video.
        start = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = torch.cat([start, rearrange(x, "b t p d -> b (t p) d")], dim=1)  # (B, 1 + T P, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class TextEncoder(nn.Module):
    def __init__(self, vocab_size, width, layers, heads, embed_dim, context_length):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, causal=True))
        end = tokens.argmax(dim=-1)  # the end token has the largest id
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if causal else None
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask, is_causal=causal)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))  # CLIP's approximation of GELU


def load_viclip(path: str | os.PathLike) -> ViCLIP:
    """Loads a ViCLIP from a file of weights: `.pth` as published (under the key `model`) or `.safetensors`.

    Sizes are read from the shapes, with heads 64 wide, as in CLIP, unless a `.safetensors` file holds its configuration as
    JSON in the metadata under `config`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds other weights.
    """
    weights = load_weights(path, "model")
    try:
        config = _stated_config(path) or _config_from_shapes(weights)
        with torch.device("meta"):
            model = ViCLIP(**config)
        model.load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[-1].strip()
        raise ValueError(f"{str(path)!r} does not hold the weights of a ViCLIP: {reason}") from error
    return model.eval().requires_grad_(False)


def _stated_config(path: str | os.PathLike) -> dict | None:
    if Path(path).suffix != ".safetensors":
        return None
    with open_tensors(path, "fetch it again") as file:
        config = (file.metadata() or {}).get("config")
    return json.loads(config) if config else None


def _config_from_shapes(weights: dict[str, torch.Tensor]) -> dict:
    vision_width, _, _, patch_size, _ = weights["vision_encoder.conv1.weight"].shape
    num_patches = len(weights["vision_encoder.positional_embedding"]) - 1
    vocab_size, text_width = weights["text_encoder.token_embedding.weight"].shape

    def layers(encoder: str) -> int:
        prefix = f"{encoder}.transformer.resblocks."
        return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

    return {
        "input_resolution": patch_size * round(num_patches**0.5),
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_layers": layers("vision_encoder"),
        "vision_heads": vision_width // 64,
        "embed_dim": weights["vision_encoder.proj"].shape[1],
        "vocab_size": vocab_size,
        "text_width": text_width,
        "text_heads": text_width // 64,
        "text_layers": layers("text_encoder"),
        "context_length": len(weights["text_encoder.positional_embedding"]),
        "num_frames": weights["vision_encoder.temporal_positional_embedding"].shape[1],
    }


def preprocess(frames: torch.Tensor, resolution: int, how: str = "published") -> torch.Tensor:
    """Prepares frames for ViCLIP.

    Args:
        frames: `uint8 (T, H, W, 3)`.
        resolution: height and width of the model's input.
        how: "published" stretches to a square (bicubic, not antialiased) and normalises by ImageNet's statistics; "vbench"
            resizes the short side, crops the centre and normalises by CLIP's statistics.

    Returns:
        `float32 (3, T, resolution, resolution)`.
    """
    if how not in PREPROCESSING:
        raise ValueError(f"preprocessing has to be one of {', '.join(PREPROCESSING)}, but is {how!r}")
    x = rearrange(frames, "t h w c -> t c h w").float()
    height, width = x.shape[2:]
    size = (resolution, resolution)
    if how == "vbench":
        scale = resolution / min(height, width)
        size = (max(resolution, int(height * scale)), max(resolution, int(width * scale)))
    x = F.interpolate(x, size, mode="bicubic", align_corners=False).round().clamp(0, 255) / 255
    top, left = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    x = x[:, :, top : top + resolution, left : left + resolution]
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (IMAGENET, CLIP)[how == "vbench"])
    return rearrange((x - mean) / std, "t c h w -> c t h w")
