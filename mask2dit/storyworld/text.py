"""Trains the small world's tokenizer and text encoder: `python -m mask2dit.storyworld.text [CONFIG.yaml] [key=value …]`.

The tokenizer is a sentencepiece model with T5's special tokens and pieces learned from captions. The encoder is a small T5
that learns to fill in hidden tokens of captions (BERT, arXiv 1810.04805). In every other step it sees the captions of two
scenes of a story at once. To infer a word hidden in one from the other, it has to know the word's actor, so that it learns to
bind attributes to actors. The folder `output_dir` gets `metrics.jsonl`, `tokenizer/` and, at the end, `text_encoder/`.

Shapes: B samples, L tokens per sample.
"""

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from mask2dit.command import run_command
from mask2dit.device import choose_device
from mask2dit.files import atomic_folder, atomic_path
from mask2dit.models.loading import load_tokenizer
from mask2dit.models.tokenizer import CHARACTERS, sentencepiece_model
from mask2dit.pipelines.saving import SPIECE
from mask2dit.randomness import generator_for
from mask2dit.storyworld.learning import LearningConfig, learn
from mask2dit.storyworld.world import UNNAMED, caption, sample_story

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextConfig(LearningConfig):
    """The tokenizer, the text encoder and its training. `configs/storyworld/text.yaml` holds the recipe."""

    output_dir: str = "outputs/storyworld/text"
    max_steps: int = 1500
    matrix_learning_rate: float = 0.01
    ema_decay: float = 0.99
    precision: str = "fp32"
    evaluate_every: int = 250
    batch_size: int = 64
    """Samples per step, of one or two captions each."""
    num_stories: int = 2000
    """Training stories from whose captions the tokenizer learns its pieces."""
    window: int = 32
    """Tokens per caption, including padding."""
    width: int = 128
    """Width of the encoder."""
    num_layers: int = 2
    """Number of encoder layers."""
    num_heads: int = 4
    """Attention heads per layer."""
    feed_forward_width: int = 256
    """Width of the feed-forward layers."""
    hidden_share: float = 0.3
    """Share of the tokens that are masked and have to be predicted."""
    num_evaluated: int = 256
    """Held-out stories per evaluation."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.hidden_share < 1:
            raise ValueError(f"hidden_share={self.hidden_share} has to be between 0 and 1")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} has to be a multiple of num_heads={self.num_heads}")


def train_text_encoder(config: TextConfig) -> int:
    """Learns the tokenizer, trains the encoder or continues its training, and writes `text_encoder/` at the end.

    Returns:
        The exit status: 0, or `command.PREEMPTED` after a SIGTERM.

    Raises:
        ValueError: if captions do not fit in the window, or from `learn`.
        FloatingPointError, OSError: from `learn`.
    """
    tokenizer = _write_tokenizer(config)
    held_out = [sample_story(seed, split="held_out") for seed in range(config.num_evaluated)]
    texts = [caption(story, k) for story in held_out for k in range(len(story.scenes))]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    logger.info("Captions have %d to %d tokens, %.1f on average", min(lengths), max(lengths), np.mean(lengths))
    if max(lengths) > config.window:
        raise ValueError(f"captions have up to {max(lengths)} tokens, more than window={config.window}: make it wider")
    encoder = create_text_encoder(config, len(tokenizer)).to(choose_device(config.device))

    def losses(step: int) -> dict[str, torch.Tensor]:
        tokens = _batch(config, tokenizer, step)
        shown, is_hidden = hide(tokens, tokenizer, config.hidden_share, generator_for(config.seed, "hidden", step))
        logits, targets = fill_in(encoder, shown, is_hidden), tokens[is_hidden].to(encoder.device)
        loss = F.cross_entropy(logits.float(), targets)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == targets).float().mean()}

    def evaluate(step: int) -> dict[str, float]:
        accuracy = {}
        for name, count in (("one_caption", 1), ("two_captions", 2)):
            samples = [[caption(story, k) for k in range(count)] for story in held_out]
            tokens = tokenize(tokenizer, samples, config.window)
            shown, is_hidden = hide(tokens, tokenizer, config.hidden_share, generator_for(config.seed, "evaluation"))
            found = fill_in(encoder, shown, is_hidden).argmax(-1).cpu()
            accuracy[f"accuracy_{name}"] = (found == tokens[is_hidden]).float().mean().item()
        return accuracy

    status = learn(config, encoder, losses, evaluate)
    if not status:
        # Half precision suffices and halves the size; the same weights serve every later stage.
        with atomic_folder(Path(config.output_dir) / "text_encoder") as folder:
            encoder.half().save_pretrained(folder)
        logger.info("Wrote %s", config.output_dir)
    return status


def learn_pieces(captions: Sequence[str]) -> bytes:
    """A sentencepiece model with T5's special tokens, identical for identical captions.

    Each word of the captions, with adjacent punctuation, becomes a piece. So does each character, so that any other text can
    be encoded too. No piece spans two words, since T5's tokenizer splits at spaces before it looks for pieces.
    """
    words = Counter(word for text in captions for word in text.split())
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as seeds:
        # Without seeds, sentencepiece starts from substrings that several words share, and drops whole words.
        seeds.writelines(f"▁{word}\t{count}\n" for word, count in words.most_common())
        seeds.flush()
        model = sentencepiece_model(
            captions,
            vocab_size=len(words) + len(CHARACTERS) + 3,
            seed_sentencepieces_file=seeds.name,
            split_by_unicode_script=False,  # punctuation stays with its word
            split_by_number=False,
        )
    # The model records its training settings, including the name of the temporary file.
    proto = ModelProto.FromString(model)
    proto.trainer_spec.ClearField("seed_sentencepieces_file")
    return proto.SerializeToString(deterministic=True)


def create_text_encoder(config: TextConfig, vocab_size: int) -> T5EncoderModel:
    """An encoder with random weights determined by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return T5EncoderModel(
            T5Config(
                vocab_size=vocab_size,
                d_model=config.width,
                d_kv=config.width // config.num_heads,
                d_ff=config.feed_forward_width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )


def tokenize(tokenizer: T5Tokenizer, samples: Sequence[Sequence[str]], window: int) -> torch.Tensor:
    """Token ids (B, L) of samples with equally many captions, concatenated and padded to one window per caption."""
    ids = [list(chain.from_iterable(tokenizer(list(sample)).input_ids)) for sample in samples]
    length = window * len(samples[0])
    return torch.tensor([sample + [tokenizer.pad_token_id] * (length - len(sample)) for sample in ids])


def hide(
    tokens: torch.Tensor, tokenizer: T5Tokenizer, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hides tokens as BERT does: 80% are replaced by the mask and 10% by a random token; 10% are unchanged.

    Args:
        tokens: (B, L).
        tokenizer: the tokenizer, whose padding is never hidden.
        share: share of the other tokens to hide.
        generator: a CPU generator.

    Returns:
        The encoder's input, (B, L), and the mask of hidden tokens, (B, L) bools.
    """
    is_hidden = (torch.rand(tokens.shape, generator=generator) < share) & (tokens != tokenizer.pad_token_id)
    how = torch.rand(tokens.shape, generator=generator)
    others = torch.randint(len(tokenizer), tokens.shape, generator=generator)
    shown = tokens.masked_fill(is_hidden & (how < 0.8), tokenizer.convert_tokens_to_ids(UNNAMED))
    return torch.where(is_hidden & (how >= 0.9), others, shown), is_hidden


def fill_in(encoder: T5EncoderModel, shown: torch.Tensor, is_hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the hidden tokens, (hidden tokens, vocabulary): the encoder's output times its own embedding.

    Padding is attended to, as in the pipeline, which gives the encoder no attention mask.
    """
    hidden = encoder(shown.to(encoder.device)).last_hidden_state[is_hidden.to(encoder.device)]
    return F.linear(hidden, encoder.get_input_embeddings().weight) * encoder.config.d_model**-0.5


def _write_tokenizer(config: TextConfig) -> T5Tokenizer:
    """The tokenizer of the run, learned and written if it is missing."""
    spiece = Path(config.output_dir) / "tokenizer" / SPIECE
    if not spiece.is_file():
        stories = [sample_story(seed) for seed in range(config.num_stories)]
        pieces = learn_pieces([caption(story, k) for story in stories for k in range(len(story.scenes))])
        spiece.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(spiece) as temporary:
            temporary.write_bytes(pieces)
    return load_tokenizer(spiece.parent)


def _batch(config: TextConfig, tokenizer: T5Tokenizer, step: int) -> torch.Tensor:
    """The tokens of a step, (B, L). Steps alternate between single captions and two captions from one story."""
    random = np.random.default_rng([config.seed, step])
    samples = []
    for seed in random.integers(2**31, size=config.batch_size):
        story = sample_story(int(seed))
        samples.append([caption(story, k) for k in random.permutation(len(story.scenes))[: 1 + step % 2]])
    return tokenize(tokenizer, samples, config.window)


if __name__ == "__main__":
    sys.exit(run_command(TextConfig, "mask2dit.storyworld.text:train_text_encoder", None, sys.argv[1:]))
