import dataclasses

import numpy as np
import pytest
import torch

from mask2dit import Mask2DiTPipeline
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.run import load_pipeline, open_prompt_cache
from mask2dit.pipelines.prompt_cache import PromptCache, text_settings

CPU = torch.device("cpu")
PROMPTS = [["a fox", "a hare"]]


@pytest.fixture
def config(small_model, tmp_path) -> InferenceConfig:
    return InferenceConfig(
        model=str(small_model), prompts=PROMPTS[0], dtype="float32", prompt_cache=str(tmp_path / "kept"), device="cpu"
    )


def run(pipe: Mask2DiTPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=1, output_type="latent", generator=generator).frames


def test_a_story_whose_prompts_are_kept_needs_no_text_encoder_and_comes_out_the_same(config):
    first = load_pipeline(config, CPU)
    assert first.text_encoder is not None
    made = run(first)
    again = load_pipeline(config, CPU)
    assert again.text_encoder is None
    assert run(again).equal(made)
    assert run(load_pipeline(dataclasses.replace(config, prompt_cache=None), CPU)).allclose(made, atol=1e-5)


def test_a_text_that_is_not_kept_loads_the_text_encoder_or_is_named(config):
    run(load_pipeline(config, CPU))
    other = dataclasses.replace(config, prompts=["a fox", "a bear"])
    assert load_pipeline(other, CPU).text_encoder is not None
    with pytest.raises(ValueError, match="a bear"):
        load_pipeline(config, CPU)(["a fox", "a bear"], num_inference_steps=1)


def test_other_weights_windows_and_forms_do_not_find_an_embedding(config, small_model, tmp_path):
    run(load_pipeline(config, CPU))
    assert open_prompt_cache(config).missing(PROMPTS[0]) == []
    for changed in ({"dtype": "bfloat16"}, {"variant": "fp16"}):
        assert open_prompt_cache(dataclasses.replace(config, **changed)).missing(PROMPTS[0]) == PROMPTS[0]
    shorter = text_settings(small_model, "float32", 32)
    assert PromptCache(config.prompt_cache, shorter, (32, 64)).missing(PROMPTS[0]) == PROMPTS[0]


def test_a_damaged_embedding_is_named(config):
    run(load_pipeline(config, CPU))
    cache = open_prompt_cache(config)
    path = cache._path("a fox")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        cache.load("a fox")
    cache.save("a hare", torch.full((64, 64), float("nan")))
    with pytest.raises(ValueError, match="damaged"):
        cache.load("a hare")
