import pytest
import torch

from mask2dit.models.context_cache import ContextCache, context_cache_bytes
from mask2dit.models.masks import MASK_VARIANTS
from mask2dit.scenes import SceneLayout

PATTERNS = [(False, False, True), (False, True, False), (True, False, True)]
LENGTHS = {"equal": (3, 3, 3), "unequal": (2, 4, 3)}


def two_calls(model, inputs, scene_frames, generated, cache=None, isolated_parts=(False,)):
    """The outputs of two calls, between which the generated scenes and their timesteps change, and generated frames."""
    latents, text, timesteps = inputs
    given = ~torch.tensor(generated)
    outputs = []
    for _ in range(2):
        timestep = timesteps.masked_fill(given, 0)
        with torch.no_grad():
            sample = model(
                latents, text, timestep, None, scene_frames, context_cache=cache, isolated_parts=isolated_parts
            ).sample
            outputs.append(sample)
        frames = given.repeat_interleave(torch.tensor(scene_frames))
        latents = torch.where(frames[None, :, None, None, None], latents, latents + outputs[-1])
        timesteps = timesteps // 2
    return outputs, ~frames


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "sincos"])
@pytest.mark.parametrize("scene_frames", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("generated", PATTERNS, ids=lambda pattern: "".join("gN"[new] for new in pattern))
@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_generated_scenes_alone_equal_all_scenes_with_frozen_given_ones(
    make_transformer, random_inputs, freeze_context, variant, generated, scene_frames, rotary
):
    if not rotary and scene_frames == LENGTHS["equal"]:
        pytest.skip("covered by unequal scenes")
    model = make_transformer(mask_variant=variant, use_rotary_positional_embeddings=rotary)
    inputs = random_inputs()
    (first, second), new = two_calls(model, inputs, scene_frames, generated, ContextCache(generated, 2))
    freeze_context(generated, 2)
    (expected_first, expected_second), _ = two_calls(model, inputs, scene_frames, generated)
    assert torch.equal(first, expected_first)
    torch.testing.assert_close(second[:, new], expected_second[:, new], atol=1e-5, rtol=1e-5)
    assert torch.equal(second[:, ~new], first[:, ~new])


@pytest.mark.parametrize("variant", ["v2", "v5"])
def test_isolated_parts_of_a_batch_see_nothing_that_is_kept(make_transformer, random_inputs, variant):
    model, isolated = make_transformer(mask_variant=variant), make_transformer(mask_variant="v1")
    inputs, frames, generated = random_inputs(), (2, 4, 3), PATTERNS[1]
    (_, found), new = two_calls(model, inputs, frames, generated, ContextCache(generated, 2), (True, False))
    (_, alone), _ = two_calls(isolated, inputs, frames, generated)
    (_, together), _ = two_calls(model, inputs, frames, generated, ContextCache(generated, 2))
    torch.testing.assert_close(found[:, new], torch.stack([alone[0], together[1]])[:, new], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_kept_bytes_are_those_predicted_from_the_configuration(make_transformer, random_inputs, variant, dtype):
    model = make_transformer(mask_variant=variant)
    generated = (False, True, False)
    cache = ContextCache(generated, 2, dtype=dtype)
    two_calls(model, random_inputs(), (3, 2, 4), generated, cache)
    layout = model.scene_layout(8, 12, (3, 2, 4))
    kept = torch.float32 if dtype == "auto" else torch.float8_e4m3fn
    assert cache.num_bytes == context_cache_bytes(model.config, layout, generated, kept, batch_size=2)
    tokens = {"v1": 0, "v2": layout.video_lengths[0] + layout.video_lengths[2]}
    if variant in tokens and dtype == "auto":
        assert cache.num_bytes == 2 * 2 * 2 * tokens[variant] * 32 * 4  # K and V, layers, stories, width, bytes


def test_the_published_size_keeps_18_gigabytes_per_branch():
    config = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "mask_variant": "v2"}
    layout = SceneLayout((226,) * 3, (13 * 30 * 45,) * 3)
    size = context_cache_bytes(config, layout, (False, False, True), torch.bfloat16)
    assert size == 2 * 42 * 35_100 * 3_072 * 2


def test_fp8_is_near_and_large_numbers_stay_finite(make_transformer, random_inputs):
    model = make_transformer()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_v.weight.mul_(1e5)  # values beyond the range of fp8
            block.attn1.to_out[0].weight.mul_(1e-5)
    caches = [ContextCache(PATTERNS[0], 2, dtype=dtype) for dtype in ("auto", "fp8")]
    exact, rough = (two_calls(model, random_inputs(), (3, 3, 3), PATTERNS[0], cache)[0][1] for cache in caches)
    error = (rough - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_a_call_without_the_negative_prompts_uses_the_prompts_half(make_transformer, random_inputs):
    """The second half of a batch holds the prompts, the first half the negative prompts, which a hook may leave out."""
    model = make_transformer()
    latents, text, timesteps = random_inputs(batch_size=4)
    timesteps[:, :2] = 0
    cache = ContextCache(PATTERNS[0], 10)
    with torch.no_grad():
        assert not cache.start_step(0, guided=True)
        model(latents, text, timesteps, context_cache=cache)
        assert cache.start_step(1, guided=True)
        both = model(latents, text, timesteps // 2, context_cache=cache).sample
        half = model(latents[2:], text[2:], timesteps[2:] // 2, context_cache=cache).sample
    torch.testing.assert_close(half, both[2:], atol=1e-6, rtol=1e-5)
    assert cache.start_step(2, guided=False) and not cache.is_filled


def test_a_cache_is_refused_where_it_cannot_be_right(make_transformer, random_inputs):
    model = make_transformer()
    latents, text, timesteps = random_inputs()
    with pytest.raises(ValueError, match="no_grad"):
        model(latents, text, timesteps, context_cache=ContextCache(PATTERNS[0], 2))
    with torch.no_grad(), pytest.raises(ValueError, match=r"for 2 scenes, but there are 3"):
        model(latents, text, timesteps, context_cache=ContextCache((False, True), 2))
    for generated in [(True, True), (False, False)]:
        with pytest.raises(ValueError, match="context_refresh=2"):
            ContextCache(generated, 2)
    with pytest.raises(ValueError, match="context_cache_dtype"):
        ContextCache(PATTERNS[0], 2, dtype="int4")


def test_a_layer_that_a_hook_skips_while_the_cache_is_filled_is_reported(make_transformer, random_inputs):
    model = make_transformer()
    latents, text, timesteps = random_inputs()
    block = model.transformer_blocks[1]
    block.forward = lambda hidden_states, encoder_hidden_states, **_: (hidden_states, encoder_hidden_states)
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer 1"):
        model(latents, text, timesteps, context_cache=ContextCache(PATTERNS[0], 2))


@pytest.mark.slow
def test_compiled_blocks_fill_and_use_the_cache(make_transformer, random_inputs):
    model = make_transformer()
    expected, _ = two_calls(model, random_inputs(), (3, 2, 4), PATTERNS[0], ContextCache(PATTERNS[0], 2))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled, _ = two_calls(model, random_inputs(), (3, 2, 4), PATTERNS[0], ContextCache(PATTERNS[0], 2))
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
