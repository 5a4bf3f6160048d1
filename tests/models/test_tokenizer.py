"""T5's tokenizer, read by transformers from `spiece.model` alone, as the released folders hold it."""

import subprocess
import sys

import pytest
from transformers import T5Tokenizer

from mask2dit.pipelines.untrained import build_untrained_model

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = build_untrained_model(tmp_path_factory.mktemp("untrained") / "model") / "tokenizer"
    assert [path.name for path in folder.iterdir()] == ["spiece.model"]
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return T5Tokenizer.from_pretrained(folder)


def test_special_tokens_are_those_of_t5(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]


def test_short_text_is_padded_after_the_end_token(tokenizer):
    ids = tokenizer("A red fox.", padding="max_length", max_length=LENGTH, truncation=True).input_ids

    end = ids.index(tokenizer.eos_token_id)
    assert len(ids) == LENGTH and 0 < end < LENGTH - 1
    assert set(ids[end + 1 :]) == {tokenizer.pad_token_id} and tokenizer.pad_token_id not in ids[:end]


def test_long_text_is_cut_and_keeps_the_end_token(tokenizer):
    text = "A red fox runs over the hills. " * 10
    ids = tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids

    assert len(ids) == LENGTH
    assert ids[:-1] == tokenizer(text).input_ids[: LENGTH - 1] and ids[-1] == tokenizer.eos_token_id


def test_empty_text_is_the_end_token_and_padding(tokenizer):
    ids = tokenizer("", padding="max_length", max_length=LENGTH, truncation=True).input_ids

    assert ids == [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (LENGTH - 1)


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over the lazy dog; 0123456789!",
        'He’s “happy” – really: 100% (yes/no)? [a_b] {c} <d> #1 & $5 ~ @home + 2*3 = 6 | ^ ` \\ "q"',
        "The naïve façade of a café in Málaga — with crème, a piñata and a “doppelgänger”.",
    ],
)
def test_english_text_has_no_unknown_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids

    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.slow
def test_reading_spiece_model_needs_protobuf(folder):
    """Why protobuf is among the requirements, though sentencepiece does not ask for it. transformers by itself names the
    cause in its log alone, and fails on another library that it tries instead."""
    script = (
        "import sys; sys.modules['google.protobuf'] = None; import transformers; from mask2dit.models import loading\n"
        "from pathlib import Path\n"
        "for read in (transformers.T5Tokenizer.from_pretrained, loading.load_tokenizer):\n"
        "    try:\n"
        "        read(Path(sys.argv[1]))\n"
        "    except Exception as error:\n"
        "        print(error, file=sys.stderr)\n"
        "        print('refused')"
    )

    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)

    assert done.stdout.split() == ["refused"] * 2, done.stderr
    assert "spiece.model' is read with protobuf: pip install protobuf" in done.stderr.splitlines()[-1]
    assert "requires the protobuf library but it was not found" in done.stderr
