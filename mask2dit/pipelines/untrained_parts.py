"""The parts of the small model with random weights that `mask2dit.pipelines.untrained` writes."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn
from transformers import T5Config, T5EncoderModel

from mask2dit.models.loading import load_tokenizer
from mask2dit.models.tokenizer import sentencepiece_model
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.saving import SPIECE, published_scheduler, save_pipeline

TEXT_WIDTH = 64
LATENT_CHANNELS = 16

# Training data of the tokenizer: captions like those that it will read.
SENTENCES = (
    "A red fox trots across a field of fresh snow at dawn, leaving a thin line of tracks behind it.",
    "The camera pans slowly over a quiet harbor while gulls circle above the fishing boats.",
    "An old man in a grey coat opens the window of his kitchen and looks out at the rain.",
    "A young woman with short black hair rides a blue bicycle along the river in the evening light.",
    "Two children are building a castle of sand on the beach; a wave rolls in and washes it away.",
    "Close-up of hands kneading dough on a wooden table, flour drifting through a ray of sunlight.",
    "The same fox stops beneath a pine tree, raises its head and listens to the wind.",
    "A wide shot of a mountain valley with a winding road and a single yellow car.",
    "In the next scene the woman walks through a busy market and buys a basket of oranges.",
    "A robot waters the flowers on a balcony high above the lights of the city.",
    "The train leaves the station, and smoke slowly fills the platform.",
    "A teacher writes a word on the blackboard, turns around and smiles at the class.",
    "Night falls over the village; one window after another begins to glow.",
    "A white cat sleeps on a pile of books next to a steaming cup of tea.",
    "The dancer spins under a spotlight, her long green dress opening like a flower.",
    "A diver swims between coral reefs while a school of silver fish turns all at once.",
    "Autumn leaves fall on an empty bench in the park; the camera zooms in on a forgotten hat.",
    "The knight pulls the sword from the stone and holds it up against the stormy sky.",
    "A tiny spaceship lands on a purple planet, its door opens and an astronaut steps out.",
    "The astronaut walks across the dunes, looking at two moons near the horizon.",
    "A cook throws vegetables into a hot pan, and flames rise for a moment.",
    "Horses gallop through shallow water, seen from above by a drone.",
    "A street musician plays the violin in front of a cafe as people pass by with umbrellas.",
    "The dog runs after the ball, jumps over a fence and disappears into tall grass.",
    "A girl blows out the candles on her birthday cake while her friends clap and sing.",
    "Time-lapse of clouds moving over a desert, with shadows crossing the rocks.",
    "An artist paints the sea on a large canvas, her apron covered with spots of color.",
    "The lighthouse beam sweeps across the dark water and briefly shows a small ship.",
    "A farmer drives a tractor along rows of golden wheat in the warm afternoon sun.",
    "The detective enters a dim room, switches on a lamp and finds a letter on the desk.",
    "Steam rises from a bowl of noodles in a small restaurant on a rainy night.",
    "A bear and her cubs cross a stream, jumping from stone to stone.",
    "The skater glides over the frozen lake, throwing up a spray of ice as she stops.",
    "A photorealistic view of a glass tower at sunset, high quality, cinematic lighting, shallow depth of field.",
    "An animated scene in the style of a picture book: a mouse sails across a pond in a paper boat.",
    "The mouse reaches the far shore and is greeted by a friendly frog with a lantern.",
    "People in colorful costumes march down the main street during the carnival.",
    "A mechanic repairs an old motorcycle in a garage full of tools and posters.",
    "The balloon rises higher and higher until the houses below look like toys.",
    "Blurry, low quality, distorted, worst quality, watermark, text, static frame.",
)


def write_parts(folder: Path, seed: int) -> None:
    """Writes all parts of the model in diffusers' layout."""
    spiece = folder / "tokenizer" / SPIECE
    spiece.parent.mkdir(parents=True)
    spiece.write_bytes(sentencepiece_model(SENTENCES, vocab_size=512))
    tokenizer = load_tokenizer(spiece.parent)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        transformer, vae, text_encoder = _transformer(), _vae(), _text_encoder(len(tokenizer))
    save_pipeline(Mask2DiTPipeline(tokenizer, text_encoder, vae, transformer, published_scheduler()), folder, spiece)


def _transformer() -> Mask2DiTTransformer3DModel:
    return Mask2DiTTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=128,
        text_embed_dim=TEXT_WIDTH,
        num_layers=3,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=64,
        use_rotary_positional_embeddings=True,
    )


def _vae() -> AutoencoderKLCogVideoX:
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 8, 8, 16),  # a thirty-second of the real ones
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    _soften(vae.decoder)
    return vae


@torch.no_grad()
def _soften(decoder: nn.Module) -> None:
    """Makes a random decoder produce soft colours instead of hard squares, one per latent pixel."""
    for name, weight in decoder.named_parameters():
        if "conv_y" in name or "conv_b" in name:  # these scale and shift features by the enlarged latents
            nn.init.constant_(weight, 1 if name.endswith("conv_y.conv.bias") else 0)
        elif weight.ndim == 5:  # a convolution with equal weights for all pixels blurs
            weight.copy_(weight.mean(dim=(-2, -1), keepdim=True).expand_as(weight))


def _text_encoder(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
