import pytest
import torch
from accelerate.utils import send_to_device
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, FirstBlockCacheConfig, UniPCMultistepScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

from mask2dit.models.attention import GivenTokens
from mask2dit.scenes import SceneLayout

FAST = {"height": 64, "width": 96, "num_inference_steps": 5, "output_type": "latent"}


def arguments(generated=(False, False, True), num_frames=(9, 9, 9), batch_size=1):
    """A call of the tiny pipeline with some scenes given; frames per scene are 1 + 4m."""
    generator = torch.Generator().manual_seed(3)
    text = (batch_size, len(generated), 6, 24)
    given = sum((n - 1) // 4 + 1 for n, new in zip(num_frames, generated) if not new)
    return {
        **FAST,
        "num_frames": num_frames,
        "scene_mask": generated,
        "prompt_embeds": torch.randn(text, generator=generator),
        "negative_prompt_embeds": torch.randn(text, generator=generator),
        "context_latents": torch.randn(batch_size, given, 4, 8, 12, generator=generator),
    }


def generate(pipe, **options):
    return pipe(**{**arguments(), **options}, generator=torch.Generator().manual_seed(0)).frames


@pytest.fixture
def computed(monkeypatch):
    """The number of video tokens and of stories that each call of a pipeline's first block gets."""

    def watch(pipe):
        calls, block = [], pipe.transformer.transformer_blocks[0]
        forward = block.forward
        monkeypatch.setattr(
            block,
            "forward",
            lambda *args, **kwargs: calls.append(kwargs["hidden_states"].shape[:2]) or forward(*args, **kwargs),
        )
        return calls

    return watch


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("case", ["last", "middle of unequal scenes", "around a given one, with LoRA"])
def test_a_video_is_that_of_all_scenes_with_given_ones_frozen_between_refreshes(
    make_pipeline, scheduler_config, freeze_context, scheduler_class, case
):
    config = dict(scheduler_config)
    if scheduler_class is UniPCMultistepScheduler:
        config = {name: value for name, value in config.items() if name not in ("clip_sample", "snr_shift_scale")}
    pipe = make_pipeline(scheduler=scheduler_class(**config))
    options = arguments()
    if case == "middle of unequal scenes":
        options = arguments((False, True, False), (9, 13, 5), batch_size=2)
    elif case == "around a given one, with LoRA":
        options = arguments((True, False, True))
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    cached = generate(pipe, **options, context_refresh=2)
    exact = generate(pipe, **options)
    freeze_context(options["scene_mask"], 2)
    torch.testing.assert_close(cached, generate(pipe, **options), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cached, exact, atol=1e-5)


@pytest.mark.parametrize("device", ["model", "cpu"])
def test_refreshing_at_every_step_and_a_single_step_are_exact(make_pipeline, device):
    pipe = make_pipeline()
    exact = generate(pipe)
    assert torch.equal(generate(pipe, context_refresh=1, context_cache_device=device), exact)
    steps = {"num_inference_steps": 1}
    assert torch.equal(
        generate(pipe, **steps, context_refresh=9, context_cache_device=device), generate(pipe, **steps)
    )


def test_isolated_scenes_lose_nothing(make_pipeline):
    pipe = make_pipeline(mask_variant="v1")
    torch.testing.assert_close(generate(pipe, context_refresh=9), generate(pipe), atol=1e-5, rtol=1e-5)


def test_generated_scenes_alone_are_computed_between_refreshes(make_pipeline, computed):
    pipe = make_pipeline()
    calls = computed(pipe)
    generate(pipe, context_refresh=3)
    assert calls == [(2, 216), (2, 72), (2, 72), (2, 216), (2, 72)]


def test_main_memory_changes_nothing_and_fp8_little(make_pipeline):
    pipe = make_pipeline()
    kept = generate(pipe, context_refresh=3)
    assert torch.equal(generate(pipe, context_refresh=3, context_cache_device="cpu"), kept)
    rough = generate(pipe, context_refresh=3, context_cache_dtype="fp8", context_cache_device="cpu")
    assert 0 < (rough - kept).norm() / kept.norm() < 0.01


def test_a_story_of_a_batch_is_what_it_is_alone(make_pipeline):
    pipe = make_pipeline()
    batch = arguments(batch_size=2)
    noise = torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    both = pipe(**batch, latents=noise, context_refresh=3).frames
    for i in range(2):
        one = {name: value[i : i + 1] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        alone = pipe(**one, latents=noise[i : i + 1], context_refresh=3).frames
        torch.testing.assert_close(alone, both[i : i + 1], atol=1e-5, rtol=1e-5)


def test_where_guidance_begins_or_ends_given_scenes_are_computed_anew(make_pipeline, computed):
    pipe = make_pipeline()
    calls = computed(pipe)

    def guide(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 3.0 if step == 1 else 1.0
        return {}

    generate(pipe, guidance_scale=1.0, context_refresh=9, callback_on_step_end=guide)
    assert calls == [(1, 216), (1, 72), (2, 216), (1, 216), (1, 72)]
    calls.clear()
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    generate(pipe, context_refresh=9, callback_on_step_end=cutoff)
    assert calls == [(2, 216), (2, 72), (1, 216), (1, 72), (1, 72)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
def test_a_callback_may_change_generated_scenes_alone(make_pipeline, name, in_place):
    pipe = make_pipeline()

    def change(scene):
        def callback(pipeline, step, timestep, tensors):
            changed = tensors[name] if in_place else tensors[name].clone()
            part = slice(3 * scene, 3 * scene + 3) if name == "latents" else scene
            changed[:, part] += 1
            return {name: changed}

        names = {"callback_on_step_end_tensor_inputs": (name,)}
        return generate(pipe, context_refresh=3, callback_on_step_end=callback, **names)

    assert not torch.equal(change(scene=2), generate(pipe, context_refresh=3))
    with pytest.raises(ValueError, match=f"changed {name} of a given scene"):
        change(scene=1)


def test_a_call_after_an_interrupted_one_is_as_if_there_had_been_none(make_pipeline):
    pipe = make_pipeline()
    expected = generate(pipe, context_refresh=3)

    def fail(pipeline, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, context_refresh=3, callback_on_step_end=fail)
    assert {name: set(vars(module)) for name, module in pipe.transformer.named_modules()} == before
    assert torch.equal(generate(pipe, context_refresh=3), expected)


def test_offloading_and_casting_of_weights_change_nothing_of_the_cache(make_pipeline):
    """The CPU stands for a GPU. Weights in fp8 change the result, with the cache as without it."""
    pipe = make_pipeline()
    expected = generate(pipe, context_refresh=3)
    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(generate(pipe, context_refresh=3), expected)

    pipe = make_pipeline()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    exact = generate(pipe)
    assert 0 < (generate(pipe, context_refresh=3) - exact).norm() < 0.05 * exact.norm()


def test_hooks_that_move_a_blocks_inputs_pass_on_the_tokens_to_fill():
    """Sequential offloading does so before each call. A copy would be filled in place of the original."""
    given = GivenTokens(SceneLayout((1, 1), (2, 2)), (False, True))
    assert send_to_device({"given": given}, "cpu")["given"] is given


def test_a_step_cache_starts_anew_where_other_scenes_are_computed(make_pipeline):
    pipe = make_pipeline()
    exact = generate(pipe, context_refresh=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    both = generate(pipe, context_refresh=3)
    assert both.isfinite().all() and not torch.equal(both, exact)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))  # skips nothing
    assert torch.equal(generate(pipe, context_refresh=3), exact)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_latents": None, "scene_mask": None, "context_refresh": 2}, "context_refresh=2 needs given"),
        ({"context_refresh": 0}, "context_refresh=0"),
        ({"context_refresh": 1.5}, r"context_refresh=1\.5"),
        ({"context_cache_device": "disk"}, "context_cache_device"),
        ({"context_cache_dtype": "int4"}, "context_cache_dtype"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_any_work(make_pipeline, monkeypatch, options, message):
    pipe = make_pipeline()
    monkeypatch.setattr(type(pipe), "_prepare", lambda *args: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        generate(pipe, **options)
