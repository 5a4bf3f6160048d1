"""Sentencepiece models for T5's tokenizer, learned from sentences."""

import io
import string
from collections.abc import Iterable

import sentencepiece

# All of these become pieces, so that English text has no unknown characters.
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "‘’“”–—áàâäçéèêëíïñóôöúü"


def sentencepiece_model(sentences: Iterable[str], vocab_size: int, **options) -> bytes:
    """Trains a unigram model with T5's special tokens, deterministic for given sentences and sentencepiece options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few sentences may yield fewer pieces
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        required_chars=CHARACTERS,
        num_threads=1,  # scores depend on this number
        minloglevel=2,
        **options,
    )
    return model.getvalue()
