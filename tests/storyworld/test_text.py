import json
from pathlib import Path

import pytest
import torch

from mask2dit.models.loading import load_text_encoder, load_tokenizer
from mask2dit.storyworld.text import TextConfig, fill_in, hide, learn_pieces, tokenize, train_text_encoder
from mask2dit.storyworld.world import UNNAMED, caption, sample_story

pytestmark = pytest.mark.slow


def captions(split, count=50):
    stories = [sample_story(seed, split=split) for seed in range(count)]
    return [caption(story, k) for story in stories for k in range(len(story.scenes))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(learn_pieces(captions("train", 2000)))
    return load_tokenizer(folder)


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        small = {"output_dir": str(tmp_path / "text"), "max_steps": 180, "batch_size": 16, "num_stories": 300}
        sizes = {"width": 32, "num_layers": 1, "num_heads": 2, "feed_forward_width": 32, "num_evaluated": 16}
        rest = {"evaluate_every": 60, "ema_decay": 0.8, "warmup_steps": 5, "precision": "fp32", "learning_rate": 1e-2}
        return TextConfig(**{**small, **sizes, **rest, **changes})

    return make


def test_captions_survive_the_tokenizer(tokenizer):
    for text in captions("held_out"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_words_are_one_token_each_and_captions_of_held_out_stories_fit_in_the_window(tokenizer):
    one_actor = "Actor1 (purple circle, wearing a hat) moves left across the desert."

    assert len(tokenizer(one_actor).input_ids) == len(one_actor.split()) + 1  # and the end
    assert max(map(len, tokenizer(captions("held_out", 300)).input_ids)) <= TextConfig().window


def test_other_texts_hold_nothing_unknown(tokenizer):
    assert tokenizer.unk_token_id not in tokenizer("A grey fox, 7 years old: it's running!").input_ids


def test_the_same_captions_give_the_same_pieces():
    assert learn_pieces(captions("train")) == learn_pieces(captions("train"))


def test_samples_are_padded_to_a_window_for_each_caption(tokenizer):
    texts = captions("train")
    tokens = tokenize(tokenizer, [texts[:2], texts[2:4]], window=32)
    length = len(tokenizer(texts[0]).input_ids)

    assert tokens.shape == (2, 64)
    assert tokens[0, :length].tolist() == tokenizer(texts[0]).input_ids
    assert tokens[0, length] == tokenizer(texts[1]).input_ids[0]
    assert tokens[0, -1] == tokenizer.pad_token_id


def test_hidden_tokens_are_mostly_masked_and_never_padding(tokenizer):
    tokens = tokenize(tokenizer, [[text] for text in captions("train")], window=32)
    shown, is_hidden = hide(tokens, tokenizer, 0.3, torch.Generator().manual_seed(0))
    is_text = tokens != tokenizer.pad_token_id
    mask = tokenizer.convert_tokens_to_ids(UNNAMED)

    assert not (is_hidden & ~is_text).any()
    assert is_hidden.sum() / is_text.sum() == pytest.approx(0.3, abs=0.03)
    assert (shown[is_hidden] == mask).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (shown[is_hidden] == tokens[is_hidden]).float().mean() == pytest.approx(0.1, abs=0.04)
    assert torch.equal(shown[~is_hidden], tokens[~is_hidden])


def test_the_encoder_learns_to_fill_in_hidden_tokens(config):
    assert train_text_encoder(config()) == 0
    lines = [json.loads(line) for line in (Path(config().output_dir) / "metrics.jsonl").read_text().splitlines()]

    assert lines[-1]["loss"] < lines[0]["loss"] * 0.8
    assert lines[-1]["accuracy_one_caption"] > 0.3


def test_the_folder_opens_as_the_pipeline_opens_it(config):
    train_text_encoder(config(max_steps=2, evaluate_every=2))
    folder = Path(config().output_dir)
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoder = load_text_encoder(folder / "text_encoder", torch.float32)
    tokens = tokenize(tokenizer, [["Actor1 (red circle) jumps in the snow."]], window=32)

    assert encoder(tokens).last_hidden_state.shape == (1, 32, 32)
    assert fill_in(encoder, tokens, tokens == tokenizer.eos_token_id).shape == (1, len(tokenizer))


def test_a_window_too_narrow_for_captions_is_refused(config):
    with pytest.raises(ValueError, match=r"captions have up to \d+ tokens, more than window=8"):
        train_text_encoder(config(window=8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_share": 1.0}, "hidden_share=1.0 has to be between 0 and 1"),
        ({"num_heads": 3}, "width=32 has to be a multiple of num_heads=3"),
    ],
)
def test_bad_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
