"""Models of the published sizes without weights, built from their known configurations, for predictions and measurements."""

from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.saving import published_scheduler

TRANSFORMERS = {
    "CogVideoX-2B": {},
    "Mask²DiT-5B": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
"""Arguments of `Mask2DiTTransformer3DModel` in which a published size differs from the defaults, those of the 2B model."""


def published_skeleton(name: str) -> Mask2DiTPipeline:
    """Builds the model of a published size, a key of `TRANSFORMERS`, without weights, text encoder and tokenizer."""
    with init_empty_weights():
        transformer = Mask2DiTTransformer3DModel(**TRANSFORMERS[name])
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3, norm_num_groups=32
        )
    return Mask2DiTPipeline(None, None, vae, transformer, published_scheduler())


def published_text_encoder() -> T5EncoderModel:
    """Builds the encoder of T5 v1.1-XXL, which the published models share, without weights."""
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with init_empty_weights():
        return T5EncoderModel(config)
