"""The small world's model folder: `python -m mask2dit.storyworld.build [CONFIG.yaml] [key=value …]`.

Puts the learned autoencoder, tokenizer and text encoder together with a transformer: one with random weights for training to
start from, or a trained one, in half precision, to be given away.
"""

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

from mask2dit.command import run_command
from mask2dit.files import atomic_folder, write_text
from mask2dit.models.loading import load_model, load_text_encoder, load_tokenizer, model_folder
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.saving import SPIECE, published_scheduler, save_pipeline
from mask2dit.storyworld.prompts import MARKER

logger = logging.getLogger(__name__)

CARD = "README.md"


@dataclass(kw_only=True)
class BuildConfig:
    """What goes into the folder. `configs/storyworld/model.yaml` holds values for all of it."""

    output: str = "outputs/storyworld/model"
    """Folder to write; an existing one is replaced except for its README.md."""
    vae: str = "outputs/storyworld/vae"
    """Output folder of `mask2dit.storyworld.vae`."""
    text: str = "outputs/storyworld/text"
    """Output folder of `mask2dit.storyworld.text`."""
    trained: str | None = None
    """Model folder whose transformer is taken, in half precision; null: random weights of the size below."""
    num_layers: int = 6
    """Number of transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads per block."""
    attention_head_dim: int = 64
    """Width of an attention head."""
    time_embed_dim: int = 64
    """Width of the timestep embedding."""
    patch_size: int = 8
    """Side of a patch in latent pixels: 8 makes 16 tokens of a latent frame of 32 x 32."""
    prediction_type: str = "sample"
    """What the transformer predicts: sample (clean latents, for which a token has to be as wide as the transformer) or
    v_prediction."""
    text_window: int = 32
    """Tokens per caption, as in the text encoder's training."""
    num_scenes: int = 3
    """Scenes per story in the transformer's training; more at a time are refused later."""
    num_frames: int = 9
    """Frames per scene."""
    height: int = 64
    """Height in pixels."""
    width: int = 64
    """Width in pixels."""
    seed: int = 0
    """Seed of the random weights."""


def build_model(config: BuildConfig) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        FileNotFoundError: if a part is missing.
        ValueError: if a file is corrupt, weights do not fit, or the size does not fit the model.
    """
    output = Path(config.output)
    vae = load_model(
        AutoencoderKLCogVideoX,
        AutoencoderKLCogVideoX.from_pretrained,
        model_folder(config.vae, "vae"),
        torch_dtype=torch.float16,
    )
    tokenizer = load_tokenizer(Path(config.text) / "tokenizer")
    text_encoder = load_text_encoder(model_folder(config.text, "text_encoder"), torch.float16)
    if config.trained is None:
        transformer = create_transformer(config, vae, text_encoder.config.d_model)
    else:
        transformer = Mask2DiTTransformer3DModel.from_pretrained(
            config.trained, subfolder="transformer", torch_dtype=torch.float16
        )
    scheduler = CogVideoXDDIMScheduler.from_config(
        published_scheduler().config, prediction_type=config.prediction_type
    )
    pipe = Mask2DiTPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipe.video_shape(config.height, config.width, config.num_frames, num_scenes=1)
    with atomic_folder(output) as written:
        save_pipeline(pipe, written, Path(config.text) / "tokenizer" / SPIECE)
        trained_with = {name: getattr(config, name) for name in ("num_scenes", "num_frames", "height", "width")}
        write_text(written / MARKER, json.dumps(trained_with) + "\n")
        if (output / CARD).is_file():
            shutil.copy2(output / CARD, written / CARD)
    logger.info("Wrote %s: a transformer of %.1f million weights", output, transformer.num_parameters() / 1e6)


def create_transformer(
    config: BuildConfig, vae: AutoencoderKLCogVideoX, text_width: int
) -> Mask2DiTTransformer3DModel:
    """A transformer with random weights that follow from the seed, for latents of this autoencoder."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return Mask2DiTTransformer3DModel(
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            time_embed_dim=config.time_embed_dim,
            text_embed_dim=text_width,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            patch_size=config.patch_size,
            sample_height=config.height // scale,
            sample_width=config.width // scale,
            sample_frames=config.num_frames,
            temporal_compression_ratio=int(vae.config.temporal_compression_ratio),
            max_text_seq_length=config.text_window,
            use_rotary_positional_embeddings=True,
        )


if __name__ == "__main__":
    sys.exit(run_command(BuildConfig, "mask2dit.storyworld.build:build_model", None, sys.argv[1:]))
