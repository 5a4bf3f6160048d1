import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.callbacks import SDCFGCutoffCallback

from mask2dit.config import CACHES, REFUSED_CACHES
from mask2dit.pipelines.step_cache import PRESETS, check_step_cache, step_cache

STEPS = 6
OPTIONS = {
    "pyramid_attention": {"timesteps": (-1, 1001)},
    "faster_cache": {"timesteps": (-1, 1001), "unconditional_timesteps": (-1, 1001)},
    "first_block": {"threshold": 1e9},
    "mag_cache": {"threshold": 0.5, "ratios": [1.0] * STEPS},
}


def generate(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    arguments = {
        **{"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": STEPS, "output_type": "latent"},
        "prompt_embeds": torch.randn(1, 3, 6, 24, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 3, 6, 24, generator=generator),
        "context_latents": torch.randn(1, 6, 4, 8, 12, generator=generator),
    }
    return pipe(**{**arguments, **options}, generator=torch.Generator().manual_seed(0)).frames


def forwards(pipe):
    """What hooks leave on modules: their wrapped `forward`, and the registry's hooks."""
    return {
        name: ("forward" in vars(module), list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})))
        for name, module in pipe.transformer.named_modules()
        if getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    }


def count(pipe):
    """Counts the calls of each layer's attention and feed-forward that are computed."""
    calls = []
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_q.register_forward_hook(lambda *args: calls.append("attention"))
        block.ff.net[2].register_forward_hook(lambda *args: calls.append("feed-forward"))
    return calls


@pytest.mark.parametrize("name", CACHES)
def test_each_cache_saves_work_alone_and_with_the_context_cache_and_leaves_nothing_behind(make_pipeline, name):
    pipe = make_pipeline()
    exact = generate(pipe)
    calls = count(pipe)
    generate(pipe)
    whole = len(calls)
    calls.clear()
    with step_cache(pipe, name, OPTIONS.get(name), STEPS):
        cached = generate(pipe)
        assert len(calls) < whole or name == "faster_cache"
        assert cached.isfinite().all() and not torch.equal(cached, exact)
    if PRESETS[name].is_resettable:
        with step_cache(pipe, name, OPTIONS.get(name), STEPS):
            assert generate(pipe, context_refresh=4).isfinite().all()
    assert not forwards(pipe) and not pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipe), exact)


@pytest.mark.parametrize("name", CACHES)
def test_an_interrupted_call_leaves_nothing_behind(make_pipeline, name):
    pipe = make_pipeline()
    exact = generate(pipe)

    def fail(pipeline, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt), step_cache(pipe, name, OPTIONS.get(name), STEPS):
        generate(pipe, callback_on_step_end=fail)
    assert not forwards(pipe)
    assert torch.equal(generate(pipe), exact)


def test_the_presets_are_the_choices_of_configurations():
    assert tuple(PRESETS) == CACHES and not set(REFUSED_CACHES) & set(CACHES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sea_cache",), "flow matching"),
        (("text_kv",), "blocks of another model"),
        (("teacache",), "cache has to be one of pyramid_attention"),
        (("first_block", {"skip_range": 2}), "cache=first_block takes threshold"),
        ((None, {"threshold": 2}), "no effect"),
        (("mag_cache", None, 5), "context_refresh=5"),
        (("mag_cache", None, 1, 6.0, (100, 800)), r"mag_cache.*guidance_interval=\(100, 800\)"),
        (("faster_cache", None, 1, 1.0), "guidance_scale above 1"),
        (("faster_cache", None, 1, 6.0, (100, 800)), "guidance_interval"),
        (("faster_cache", None, 1, 6.0, None, True), "context_guidance"),
    ],
)
def test_what_does_not_work_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_step_cache(*arguments)


def test_a_cache_that_replaces_the_unguided_branch_is_refused_where_that_sees_each_scene_alone(make_pipeline):
    pipe = make_pipeline()
    with step_cache(pipe, "faster_cache"), pytest.raises(ValueError, match="context_guidance"):
        generate(pipe, context_guidance=True)


@pytest.mark.parametrize("name", [name for name in CACHES if name != "faster_cache"])
def test_other_caches_work_with_context_guidance(make_pipeline, name):
    pipe = make_pipeline()
    with step_cache(pipe, name, OPTIONS.get(name), STEPS):
        cached = generate(pipe, context_guidance=True)
    assert cached.isfinite().all() and not torch.equal(cached, generate(pipe))


def test_a_callback_cannot_end_guidance_with_a_cache_that_counts_steps(make_pipeline):
    pipe = make_pipeline()
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with step_cache(pipe, "mag_cache", OPTIONS["mag_cache"], STEPS), pytest.raises(ValueError, match="mag_cache"):
        generate(pipe, callback_on_step_end=cutoff)
    with step_cache(pipe, "first_block", OPTIONS["first_block"], STEPS):
        assert generate(pipe, callback_on_step_end=cutoff).isfinite().all()


def test_mag_cache_needs_the_ratios_of_its_model(make_pipeline):
    with pytest.raises(ValueError, match="calibrate"), step_cache(make_pipeline(), "mag_cache"):
        pass


def test_guidance_on_an_interval_is_exact_inside_it_and_computes_one_branch_outside(
    make_pipeline, scheduler_config, monkeypatch
):
    pipe = make_pipeline(scheduler=CogVideoXDDIMScheduler(**scheduler_config))
    batches, forward = [], pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda *args, **kwargs: batches.append(len(kwargs["hidden_states"])) or forward(*args, **kwargs),
    )
    guided, unguided = generate(pipe), generate(pipe, guidance_scale=1.0)
    assert torch.equal(generate(pipe, guidance_interval=(0, 1000)), guided)
    assert torch.equal(generate(pipe, guidance_interval=(0, 0)), unguided)
    batches.clear()
    partly = generate(pipe, guidance_interval=(300, 700))
    timesteps = pipe.scheduler.timesteps.tolist()
    assert batches == [2 if 300 <= t <= 700 else 1 for t in timesteps] and 1 < batches.count(2) < STEPS
    assert not torch.equal(partly, guided) and not torch.equal(partly, unguided)

    def guide(pipeline, step, timestep, tensors):  # the same by guidance that a callback sets for the next step
        following = timesteps[min(step + 1, STEPS - 1)]
        pipeline._guidance_scale = 6.0 if 300 <= following <= 700 else 1.0
        return {}

    assert torch.equal(generate(pipe, guidance_scale=1.0, callback_on_step_end=guide), partly)
    cached = generate(pipe, guidance_interval=(300, 700), context_refresh=9)
    assert (cached - partly).norm() < 0.2 * partly.norm()


@pytest.mark.parametrize("interval", [(1,), (-1, 5), (0, 1001), (600, 400)])
def test_an_impossible_guidance_interval_is_refused(make_pipeline, interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        generate(make_pipeline(), guidance_interval=interval)
