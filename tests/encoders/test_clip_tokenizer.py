import json

import pytest

from mask2dit.encoders.clip_tokenizer import ViCLIPTokenizer, clip_tokenizer, load_clip_tokenizer


def test_known_texts_have_clips_token_ids(tmp_path):
    tokenizer = ViCLIPTokenizer(load_clip_tokenizer(tmp_path))
    assert len(tokenizer.tokenizer) == 49408
    assert tokenizer.window("a photo of a cat").tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 25
    assert tokenizer.window("A  PHOTO\nof a Cat").tolist() == tokenizer.window("a photo of a cat").tolist()


def test_ids_are_the_same_from_the_files_of_a_folder(tmp_path):
    tokenizer = load_clip_tokenizer(tmp_path)
    text = "Actor1 (a girl's café, 3½ years old) – waves; don't!"
    expected = tokenizer(text)["input_ids"]
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = "\n".join(" ".join(pair) for pair in tokenizer._merges)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    assert load_clip_tokenizer(tmp_path)(text)["input_ids"] == expected


@pytest.fixture
def letters():
    """Every letter is a token, so that 30 of them fill a window."""
    return ViCLIPTokenizer(clip_tokenizer([]))


def test_a_long_text_is_cut_and_said_to_be(letters):
    assert not letters.is_cut("a" * 30)
    assert letters.is_cut("a" * 31)
    window = letters.window("a" * 40)
    assert window[0] == 512 and window[-1] == 513
    assert letters.window("a" * 30).tolist() == [512, *window[1:30].tolist(), letters.window("a")[1].item(), 513]


def test_chunks_hold_the_whole_text_and_keep_words_whole(letters):
    words = ["abcdefghijkl", "mnopqrstuvwx", "yzabcdefghij", "klm"]
    chunks = letters.chunks(" ".join(words))
    texts = [letters.tokenizer.decode(chunk[chunk > 0], skip_special_tokens=True).strip() for chunk in chunks]
    assert [text.replace(" ", "") for text in texts] == ["".join(words[:2]), "".join(words[2:])]
    assert (chunks[0] == letters.window(" ".join(words[:2]))).all()


def test_a_word_longer_than_a_window_is_split_rather_than_lost(letters):
    assert len(letters.chunks("a" * 65)) == 3
    assert len(letters.chunks("")) == 1
