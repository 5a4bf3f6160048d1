import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel, FirstBlockCacheConfig
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LoraConfig
from torch._dynamo.utils import counters

from mask2dit.models import attention
from mask2dit.models.masks import MASK_VARIANTS, dense_mask

POSITIONS = {
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {},
    "1.5": {"patch_size_t": 2, "patch_bias": False, "sample_frames": 13},
}


@pytest.mark.parametrize("name", ["2b_v2_3scenes", "5b_v2_3scenes", "5b_v2_3scenes_conditional", "5b_v5_3scenes"])
def test_the_published_numbers_are_reproduced(parity, name):
    file = parity(f"transformer_{name}")
    num_scenes, num_context = int(file.settings["num_scenes"]), int(file.settings["context_scenes"])
    timestep = file["in.timestep"][:, None].repeat(1, num_scenes)
    timestep[:, :num_context] = 0
    transformer = file.transformer()
    if "in.rope_cos" in file:
        cos, sin = transformer.rotary_embeddings(8, 12, 9)
        torch.testing.assert_close(cos, file["in.rope_cos"], atol=1e-6, rtol=0)
        torch.testing.assert_close(sin, file["in.rope_sin"], atol=1e-6, rtol=0)
    with torch.no_grad():
        sample = transformer(file["in.hidden_states"], file["in.encoder_hidden_states"], timestep).sample
    torch.testing.assert_close(sample, file["out.sample"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_one_scene_at_the_base_size_equals_cogvideox_exactly(make_transformer, random_inputs, positions, variant):
    transformer = make_transformer(**POSITIONS[positions], mask_variant=variant)
    config = {key: value for key, value in transformer.config.items() if key != "mask_variant"}
    cogvideox = CogVideoXTransformer3DModel(**config).eval()
    cogvideox.load_state_dict(transformer.state_dict())
    num_frames = 4 if positions == "1.5" else 3
    latents, text, _ = random_inputs(num_scenes=1, num_frames=num_frames)
    timestep = torch.tensor([5, 900])
    rotary = transformer.rotary_embeddings(8, 12, num_frames)
    with torch.no_grad():
        expected = cogvideox(latents, text, timestep, image_rotary_emb=rotary).sample
        assert torch.equal(transformer(latents, text, timestep).sample, expected)
        assert torch.equal(transformer(latents, text, timestep[:, None], image_rotary_emb=rotary).sample, expected)


@pytest.mark.parametrize("variant", MASK_VARIANTS)
@pytest.mark.parametrize("scene_frames", [(3, 3, 3), (2, 4, 3)])
def test_a_forward_and_its_gradients_equal_those_with_the_dense_mask(
    make_transformer, random_inputs, monkeypatch, variant, scene_frames
):
    latents, text, timesteps = random_inputs()
    timesteps[:, 0] = 0
    transformer = make_transformer(mask_variant=variant)

    def run():
        transformer.zero_grad()
        sample = transformer(latents, text, timesteps, scene_frames=scene_frames).sample
        sample.square().sum().backward()
        return sample.detach(), [parameter.grad.clone() for parameter in transformer.parameters()]

    def dense(query, key, value, layout, variant, backend, given):
        mask = dense_mask(layout, variant)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    sample, gradients = run()
    monkeypatch.setattr(attention, "grouped_attention", dense)
    expected, expected_gradients = run()
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-4)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-3)


def test_a_prompt_reaches_other_scenes_only_through_their_video(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    changed = text.clone()
    changed[:, :6] += 1  # the first scene's prompt
    one_layer = make_transformer(num_layers=1)
    isolated = make_transformer(mask_variant="v1")
    with torch.no_grad():
        difference = one_layer(latents, text, timesteps).sample - one_layer(latents, changed, timesteps).sample
        assert difference[:, :3].abs().max() > 1e-4
        assert difference[:, 3:].abs().max() == 0  # after one layer, only the first scene's video has seen it
        difference = isolated(latents, text, timesteps).sample - isolated(latents, changed, timesteps).sample
        assert difference[:, 3:].abs().max() == 0


def test_parts_of_a_batch_whose_scenes_are_isolated_equal_those_of_mask_v1(make_transformer, random_inputs):
    inputs = random_inputs()
    model, isolated = make_transformer(), make_transformer(mask_variant="v1")
    with torch.no_grad():
        expected = torch.cat([isolated(*inputs).sample, model(*inputs).sample])
        twice = [torch.cat([tensor] * 2) for tensor in inputs]
        torch.testing.assert_close(model(*twice, isolated_parts=(True, False)).sample, expected)
        torch.testing.assert_close(model(*inputs, isolated_parts=(True,)).sample, isolated(*inputs).sample)
        with pytest.raises(ValueError, match=r"isolated_parts .* batch of 2"):
            model(*inputs, isolated_parts=(True, False, False))


def test_isolated_scenes_are_recomputed_as_they_were_by_gradient_checkpointing(make_transformer, random_inputs):
    gradients = []
    for checkpoints in (False, True):
        transformer = make_transformer().train()
        if checkpoints:
            transformer.enable_gradient_checkpointing()
        transformer(*random_inputs(), isolated_parts=(True,)).sample.sum().backward()
        gradients.append([parameter.grad for parameter in transformer.parameters()])
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected)


def test_a_timestep_a_story_is_the_same_as_that_timestep_for_each_of_its_scenes(make_transformer, random_inputs):
    latents, text, _ = random_inputs()
    timestep = torch.tensor([7, 800])
    transformer = make_transformer()
    with torch.no_grad():
        sample = transformer(latents, text, timestep).sample
        assert torch.equal(sample, transformer(latents, text, timestep[:, None].repeat(1, 3)).sample)


def test_each_scene_is_modulated_by_its_own_timestep(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer(mask_variant="v1")  # scenes isolated: the timestep is all that could leak
    other = timesteps.clone()
    other[:, 1] = 0
    with torch.no_grad():
        difference = transformer(latents, text, timesteps).sample - transformer(latents, text, other).sample
    assert difference[:, 3:6].abs().max() > 1e-4
    assert difference[:, :3].abs().max() == difference[:, 6:].abs().max() == 0


def test_stories_of_a_batch_do_not_touch_each_other(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer()
    with torch.no_grad():
        together = transformer(latents, text, timesteps).sample
        alone = transformer(latents[1:], text[1:], timesteps[1:]).sample
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_scenes_of_unequal_length_are_cut_where_scene_frames_says(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer(mask_variant="v1")
    with torch.no_grad():
        sample = transformer(latents, text, timesteps, scene_frames=(2, 4, 3)).sample
        assert sample.shape == latents.shape
        changed = latents.clone()
        changed[:, 2:6] += 1
        difference = sample - transformer(changed, text, timesteps, scene_frames=(2, 4, 3)).sample
    assert difference[:, 2:6].abs().amax(dim=(0, 2, 3, 4)).min() > 0
    assert difference[:, :2].abs().max() == difference[:, 6:].abs().max() == 0


def test_temporal_patches_never_straddle_scenes(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs(num_scenes=2, num_frames=6)
    transformer = make_transformer(**POSITIONS["1.5"])
    assert transformer(latents, text, timesteps, scene_frames=(4, 2)).sample.shape == latents.shape
    with pytest.raises(ValueError, match="temporal patch of 2, but one has 3"):
        transformer(latents, text, timesteps)


@pytest.mark.parametrize("interval", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(make_transformer, random_inputs, interval):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer()
    transformer(latents, text, timesteps).sample.sum().backward()
    expected = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()
    transformer.enable_gradient_checkpointing()
    transformer.gradient_checkpointing_interval = interval
    transformer.train()(latents, text, timesteps).sample.sum().backward()
    for parameter, gradient in zip(transformer.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_blocks_compile_without_a_graph_break(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer(num_layers=1)
    with torch.no_grad():
        expected = transformer(latents, text, timesteps).sample
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(transformer(latents, text, timesteps).sample, expected)


@pytest.mark.slow
def test_blocks_are_compiled_once_per_number_of_scenes_whatever_their_lengths(make_transformer, random_inputs):
    torch.compiler.reset()
    plain, compiled = make_transformer(), make_transformer()
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    counters["stats"].clear()
    with torch.no_grad():
        for num_scenes in (3, 4, 1):
            for frames in (3, 2):
                inputs = random_inputs(num_scenes=num_scenes, num_frames=num_scenes * frames)
                kwargs = {"scene_frames": (frames,) * num_scenes}
                torch.testing.assert_close(compiled(*inputs, **kwargs).sample, plain(*inputs, **kwargs).sample)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_the_whole_transformer_compiles_for_every_number_of_scenes(make_transformer, random_inputs):
    torch.compiler.reset()
    transformer = make_transformer(num_layers=1)
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for num_scenes in (3, 2, 1):
            inputs = random_inputs(num_scenes=num_scenes, num_frames=num_scenes * 3)
            torch.testing.assert_close(compiled(*inputs).sample, transformer(*inputs).sample)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_compiled_blocks_take_other_scene_lengths(make_transformer, random_inputs, variant):
    torch.compiler.reset()  # the number of recompilations is limited over all tests together
    config = {"mask_variant": variant, "num_layers": 1}
    plain, compiled = make_transformer(**config), make_transformer(**config)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch.no_grad():
        for scene_frames in ((3, 3, 3), (2, 2, 2), (2, 4, 3)):
            inputs = random_inputs(num_scenes=3, num_frames=sum(scene_frames))
            expected = plain(*inputs, scene_frames=scene_frames).sample
            torch.testing.assert_close(compiled(*inputs, scene_frames=scene_frames).sample, expected)


def test_lora_is_scaled_by_attention_kwargs_and_only_for_that_call(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer()
    with torch.no_grad():
        plain = transformer(latents, text, timesteps).sample
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        full = transformer(latents, text, timesteps).sample
        none = transformer(latents, text, timesteps, attention_kwargs={"scale": 0.0}).sample
        again = transformer(latents, text, timesteps).sample
    torch.testing.assert_close(none, plain)
    assert (full - plain).abs().max() > 1e-3
    assert torch.equal(full, again)


def test_the_first_block_cache_of_diffusers_skips_the_other_blocks(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    transformer = make_transformer(num_layers=3)
    calls = []
    transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = transformer(latents, text, timesteps).sample
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # everything after the first block is reused
        with transformer.cache_context("cond"):
            first = transformer(latents, text, timesteps).sample
            second = transformer(latents, text, timesteps).sample
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)
    assert len(calls) == 2  # without the cache, and the first call with it


def test_fp8_storage_and_group_offload_reach_every_call(make_transformer, random_inputs):
    latents, text, timesteps = random_inputs()
    with torch.no_grad():
        expected = make_transformer()(latents, text, timesteps).sample
        offloaded = make_transformer()
        cpu = torch.device("cpu")
        offloaded.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        torch.testing.assert_close(offloaded(latents, text, timesteps).sample, expected)
        cast = make_transformer()
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert cast.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
        error = (cast(latents, text, timesteps).sample - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.2


def test_processors_that_would_drop_the_mask_are_refused(make_transformer):
    transformer = make_transformer()
    with pytest.raises(ValueError, match="CogVideoXAttnProcessor2_0 takes no `layout`"):
        transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    with pytest.raises(NotImplementedError, match="mask"):
        transformer.fuse_qkv_projections()


def test_the_config_keeps_every_argument(make_transformer):
    transformer = make_transformer(**POSITIONS["2b"], mask_variant="v3", num_layers=1)
    config = transformer.config
    assert (config.mask_variant, config.num_layers, config.use_rotary_positional_embeddings) == ("v3", 1, False)
    assert type(transformer).from_config(config).config == config
    assert not any("pos_embedding" in name for name in transformer.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": (2, 17, 24)}, "17 text tokens .* scenes of 6"),
        ({"text": (1, 18, 24)}, "2 stories of latents do not fit 1 stories of text"),
        ({"text": (2, 18, 23)}, "23, but the model takes 4 and 24"),
        ({"latents": (2, 9, 5, 8, 12)}, "5 channels"),
        ({"latents": (2, 8, 4, 8, 12)}, "8 latent frames do not divide into 3 equal scenes"),
        ({"latents": (2, 9, 4, 7, 12)}, "7x12 do not divide into patches of 2x2"),
        ({"timestep": (3,)}, r"\(2,\) or \(2, 3\).* but has \(3,\)"),
        ({"timestep": (2, 2)}, r"but has \(2, 2\)"),
        ({"scene_frames": (4, 5)}, "2 scenes, but there is text for 3"),
        ({"scene_frames": (3, 3, 4)}, "add up to 10 latent frames, but there are 9"),
        ({"scene_frames": (9, 0, 0)}, "but one has 0"),
        ({"rotary": 215}, "215 positions for 216 video tokens"),
    ],
)
def test_bad_shapes_are_refused_with_both_numbers(make_transformer, change, message):
    rotary = change.get("rotary")
    with pytest.raises(ValueError, match=message):
        make_transformer()(
            torch.zeros(change.get("latents", (2, 9, 4, 8, 12))),
            torch.zeros(change.get("text", (2, 18, 24))),
            torch.zeros(change.get("timestep", (2, 3)), dtype=torch.long),
            scene_frames=change.get("scene_frames"),
            image_rotary_emb=(torch.zeros(rotary, 16),) * 2 if rotary else None,
        )


def test_positions_that_a_model_does_not_have_are_refused(make_transformer):
    with pytest.raises(ValueError, match="12 latent frames are more than the 9"):
        make_transformer(**POSITIONS["2b"]).scene_layout(8, 12, (4, 4, 4))
    with pytest.raises(ValueError, match=r"5x6 tokens .* 4x6"):
        make_transformer(**POSITIONS["1.5"]).scene_layout(10, 12, (2, 2))
    with pytest.raises(ValueError, match="image-to-video"):
        make_transformer(use_learned_positional_embeddings=True)


def test_another_size_than_the_base_works_with_every_kind_of_positions(make_transformer):
    text, timesteps = torch.zeros(1, 12, 24), torch.zeros(1, 2, dtype=torch.long)
    for name, config in POSITIONS.items():
        latents = torch.randn(1, 4, 4, 6, 8)
        assert make_transformer(**config)(latents, text, timesteps).sample.shape == latents.shape, name
