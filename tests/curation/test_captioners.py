import shutil
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mask2dit.curation.captioners import TransformersCaptioner, check_captioner
from mask2dit.curation.config import CaptionConfig

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}assistant"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A vision-language model of LLaVA's kind with random weights, whose words are few."""
    folder = tmp_path_factory.mktemp("vlm") / "model"
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "user", "assistant", "Scene", "one", "two", "fox", "snow"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE
    )
    processor.num_additional_image_tokens = 1
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
        ).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def messages(count):
    image = Image.new("RGB", (32, 24), "red")
    content = [
        part for i in range(count) for part in ({"type": "text", "text": "Scene"}, {"type": "image", "image": image})
    ]
    return [{"role": "user", "content": content}]


def test_a_local_model_sees_every_frame_and_answers_the_same_each_time(tiny_model):
    config = CaptionConfig(
        backend="transformers", model=str(tiny_model), dtype="float32", max_new_tokens=5, device="cpu"
    )
    captioner = TransformersCaptioner(config)
    one, two = captioner.ask(messages(1)), captioner.ask(messages(2))
    # Four patches a picture of 16x16, and the word before it.
    assert two.input_tokens - one.input_tokens == 5
    assert 1 <= one.output_tokens <= 5 and captioner.ask(messages(1)) == one


def test_a_folder_without_a_model_is_refused(tmp_path):
    for model, message in (
        (tmp_path / "nowhere", "has to be a folder"),
        (tmp_path, "does not hold a vision-language model"),
    ):
        with pytest.raises(ValueError, match=message):
            check_captioner(CaptionConfig(backend="transformers", model=str(model), device="cpu"))


def test_a_model_is_checked_without_its_weights(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    check_captioner(CaptionConfig(backend="transformers", model=str(folder), device="cpu"))


def test_a_local_model_needs_no_package_of_endpoints(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    check_captioner(CaptionConfig(backend="transformers", model=str(tiny_model), device="cpu"))
    for backend in ("openai", "stand_in"):
        with pytest.raises(ValueError, match="'openai' is missing"):
            check_captioner(CaptionConfig(backend=backend, base_url="http://localhost/v1", model="m"))
