import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from mask2dit import Mask2DiTPipeline
from mask2dit.pipelines import mask2dit
from mask2dit.pipelines.mask2dit import SCHEDULERS
from mask2dit.video.reading import open_video
from mask2dit.video.writing import write_video

SIZE = {"height": 64, "width": 96, "num_frames": 9}  # 3 latent frames of 8x12 a scene
FAST = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def embeds():
    """Random prompt and negative embeddings (B, S, L, D) for the tiny pipeline."""

    def make(batch_size=1, num_scenes=3):
        generator = torch.Generator().manual_seed(3)
        shape = (batch_size, num_scenes, 6, 24)
        return {
            "prompt_embeds": torch.randn(shape, generator=generator),
            "negative_prompt_embeds": torch.randn(shape, generator=generator),
        }

    return make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_context(batch_size=1, num_frames=6):
    return torch.randn(batch_size, num_frames, 4, 8, 12, generator=seeded(7))


@pytest.fixture
def video(tmp_path):
    """A file of 30 frames of moving stripes."""

    def make(name="scene.mp4", num_frames=30):
        t = np.arange(num_frames)[:, None, None, None]
        x = np.arange(120)[None, None, :, None]
        frames = np.broadcast_to((x + 3 * t) * 2 % 256, (num_frames, 80, 120, 3)).astype(np.uint8)
        write_video(tmp_path / name, frames, fps=8)
        return tmp_path / name

    return make


# --- Parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, context", [("fixed_3scenes", None), ("extension_2to3scenes", "in.context_latents_noised")]
)
def test_the_published_latents_are_reproduced(parity, make_pipeline, name, context):
    file = parity(f"pipeline_{name}")
    settings = file.settings
    scheduler = CogVideoXDDIMScheduler(**json.loads(settings["scheduler"]))
    latents = make_pipeline(file.transformer(), scheduler)(
        prompt_embeds=file["in.prompt_embeds"].unflatten(1, (3, -1)),
        negative_prompt_embeds=file["in.negative_prompt_embeds"].unflatten(1, (3, -1)),
        height=int(settings["height"]),
        width=int(settings["width"]),
        num_frames=int(settings["num_frames"]),
        num_inference_steps=int(settings["num_inference_steps"]),
        guidance_scale=float(settings["guidance_scale"]),
        latents=file["in.latents"],
        context_latents=file[context] if context else None,
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, file["out.latents"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("use_dynamic_cfg", [False, True])
def test_one_scene_is_what_cogvideox_makes(make_pipeline, embeds, scheduler_config, scheduler_class, use_dynamic_cfg):
    pipe = make_pipeline(scheduler=scheduler_class(**scheduler_config))
    config = {key: value for key, value in pipe.transformer.config.items() if key != "mask_variant"}
    transformer = CogVideoXTransformer3DModel(**config).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    cogvideox = CogVideoXPipeline(None, None, pipe.vae, transformer, pipe.scheduler)
    cogvideox.set_progress_bar_config(disable=True)
    common = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3, "use_dynamic_cfg": use_dynamic_cfg}
    text = embeds(num_scenes=1)
    expected = cogvideox(
        **{name: embed[:, 0] for name, embed in text.items()}, **common, generator=seeded(), output_type="np"
    ).frames
    frames = pipe(**text, **common, generator=seeded(), output_type="np").frames
    np.testing.assert_array_equal(frames, expected)


# --- Scenes, context, shapes ----------------------------------------------------------------------------------------


def test_every_output_type_has_all_scenes(make_pipeline, embeds):
    pipe = make_pipeline()
    arguments = {**embeds(batch_size=2), **SIZE, "num_inference_steps": 1, "num_frames": [9, 5, 13]}
    frames = pipe(**arguments, generator=seeded(), output_type="np").frames
    assert frames.shape == (2, 27, 64, 96, 3)
    assert 0 <= frames.min() < frames.max() <= 1
    pt = pipe(**arguments, generator=seeded(), output_type="pt").frames
    np.testing.assert_array_equal(pt.permute(0, 1, 3, 4, 2).numpy(), frames)
    pil = pipe(**arguments, generator=seeded(), output_type="pil").frames
    assert [len(story) for story in pil] == [27, 27]
    assert isinstance(pil[0][0], Image.Image) and pil[0][0].size == (96, 64)
    latents = pipe(**arguments, generator=seeded(), output_type="latent", return_dict=False)[0]
    assert latents.shape == (2, 9, 4, 8, 12)


def test_scenes_are_decoded_one_by_one(make_pipeline, embeds):
    pipe = make_pipeline()
    latents = pipe(**embeds(), **FAST, generator=seeded()).frames
    video = pipe.decode_latents(latents, (3, 3, 3))
    for scene in range(3):
        alone = pipe.decode_latents(latents[:, 3 * scene : 3 * scene + 3], (3,))
        np.testing.assert_array_equal(video[:, 9 * scene : 9 * scene + 9], alone)


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_context_stays_as_it_was_given_and_shapes_what_is_generated(
    make_pipeline, embeds, scheduler_config, scheduler_class
):
    pipe = make_pipeline(scheduler=scheduler_class(**scheduler_config))
    context = random_context()
    latents = pipe(**embeds(), **FAST, context_latents=context, generator=seeded()).frames
    assert torch.equal(latents[:, :6], context)
    assert latents.isfinite().all()
    other = pipe(**embeds(), **FAST, context_latents=context + 1, generator=seeded()).frames
    assert (latents[:, 6:] - other[:, 6:]).abs().max() > 1e-3


def test_context_scenes_get_timestep_0_and_the_others_the_samplers(make_pipeline, embeds, monkeypatch):
    pipe = make_pipeline()
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda *args, **kwargs: seen.append(kwargs["timestep"]) or forward(*args, **kwargs),
    )
    pipe(**embeds(), **FAST, context_latents=random_context(), generator=seeded())
    assert [timestep.tolist() for timestep in seen] == [[[0, 0, 999]] * 2, [[0, 0, 499]] * 2]


def test_any_scenes_of_a_video_can_be_generated_anew(make_pipeline, embeds):
    pipe = make_pipeline()
    context = random_context()
    latents = pipe(
        **embeds(), **FAST, context_latents=context, scene_mask=[False, True, False], generator=seeded()
    ).frames
    assert torch.equal(latents[:, :3], context[:, :3])
    assert torch.equal(latents[:, 6:], context[:, 3:])
    assert (latents[:, 3:6] - context[:, 3:]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_context_adds_the_noise_of_timestep_0(make_pipeline, embeds, dtype):
    pipe = make_pipeline()
    pipe.transformer.to(dtype)
    context = random_context().to(dtype)
    noised = pipe(**embeds(), **FAST, context_latents=context, noise_context=True, generator=seeded()).frames[:, :6]
    sigma = float(1 - pipe.scheduler.alphas_cumprod[0]) ** 0.5
    assert float((noised.float() - context.float()).std()) == pytest.approx(sigma, rel=0.1)


def test_given_latents_are_the_noise_of_the_generated_scenes_alone(make_pipeline, embeds):
    pipe = make_pipeline()
    context = random_context()
    noise = torch.randn(1, 3, 4, 8, 12, generator=seeded())
    given = pipe(**embeds(), **FAST, context_latents=context, latents=noise).frames
    drawn = pipe(**embeds(), **FAST, context_latents=context, generator=seeded()).frames
    assert torch.equal(given, drawn)


def test_context_from_files_and_from_arrays_is_the_same(make_pipeline, embeds, video):
    pipe = make_pipeline()
    paths = [video("a.mp4"), video("b.mp4", 40)]
    arrays = [open_video(path).read(range(open_video(path).num_frames)).numpy() for path in paths]
    from_files = pipe(**embeds(), **FAST, context_video=paths, generator=seeded()).frames
    from_arrays = pipe(**embeds(), **FAST, context_video=arrays, generator=seeded()).frames
    assert torch.equal(from_files, from_arrays)
    encoded = pipe.encode_context([paths], (9, 9), 64, 96)
    assert torch.equal(from_files[:, :6], encoded)


def test_each_story_of_a_batch_has_its_own_context(make_pipeline, embeds, video):
    pipe = make_pipeline()
    a, b = video("a.mp4"), video("b.mp4", 60)
    latents = pipe(**embeds(2), **FAST, context_video=[[a, b], [b, a]], generator=seeded()).frames
    torch.testing.assert_close(latents[0, :3], latents[1, 3:6], atol=1e-5, rtol=1e-5)
    assert (latents[0, :3] - latents[1, :3]).abs().max() > 1e-3


def test_encoding_can_sample_the_posterior_and_start_at_random_repeatably(make_pipeline, video):
    pipe = make_pipeline()
    path = video(num_frames=60)
    mode = pipe.encode_context([[path]], (9,), 64, 96)
    sampled = [
        pipe.encode_context([[path]], (9,), 64, 96, start="random", sample_posterior=True, generator=seeded(1))
        for _ in range(2)
    ]
    assert torch.equal(*sampled)
    assert (sampled[0] - mode).abs().max() > 1e-3


def test_a_story_of_a_batch_is_what_it_is_alone(make_pipeline, embeds):
    pipe = make_pipeline()
    text = embeds(2)
    together = pipe(**text, **FAST, generator=[seeded(1), seeded(2)]).frames
    alone = pipe(**{name: embed[1:] for name, embed in text.items()}, **FAST, generator=seeded(2)).frames
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_video_and_another_seed_another(make_pipeline, embeds):
    pipe = make_pipeline()
    first, again, other = (pipe(**embeds(), **FAST, generator=seeded(seed)).frames for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_cogvideox_1_5_makes_scenes_of_an_even_number_of_latent_frames(make_pipeline, embeds):
    pipe = make_pipeline(patch_size_t=2, sample_frames=13)
    frames = pipe(**embeds(), height=64, width=96, num_frames=13, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 39, 64, 96, 3)


# --- Guidance and callbacks -----------------------------------------------------------------------------------------


def test_without_guidance_the_transformer_sees_each_story_once(make_pipeline, embeds, monkeypatch):
    pipe = make_pipeline()
    sizes = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda *args, **kwargs: sizes.append(len(kwargs["hidden_states"])) or forward(*args, **kwargs),
    )
    pipe(prompt_embeds=embeds()["prompt_embeds"], **FAST, guidance_scale=1.0)
    pipe(**embeds(), **FAST, guidance_scale=6.0)
    assert sizes == [1, 1, 2, 2]


def test_context_guidance_compares_with_each_scene_alone_where_scenes_are_given(make_pipeline, embeds):
    pipe, isolated = make_pipeline(), make_pipeline(mask_variant="v1")
    context = torch.randn(1, 3, 4, 8, 12, generator=torch.Generator().manual_seed(1))

    def latents(pipe, guidance_scale, **options):
        generator = torch.Generator().manual_seed(0)
        arguments = {**embeds(), **FAST, "num_inference_steps": 1, "context_latents": context, **options}
        return pipe(**arguments, guidance_scale=guidance_scale, generator=generator).frames

    # A step is linear in the prediction, so that the branches can be computed one by one.
    alone = latents(isolated, 1.0, prompt_embeds=embeds()["negative_prompt_embeds"])
    together = latents(pipe, 1.0)
    found = latents(pipe, 3.0, context_guidance=True)
    torch.testing.assert_close(found, alone + 3 * (together - alone), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(latents(pipe, 3.0), found, atol=1e-3)
    nothing_given = [latents(pipe, 3.0, context_latents=None, context_guidance=guided) for guided in (False, True)]
    assert torch.equal(*nothing_given)


def test_a_callback_sees_all_scenes_can_change_them_and_cannot_change_given_ones(make_pipeline, embeds):
    pipe = make_pipeline()
    context = random_context()
    steps = []

    def zero(pipeline, step, timestep, tensors):
        steps.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe(**embeds(), **FAST, context_latents=context, callback_on_step_end=zero).frames
    assert steps == [(0, 999, (1, 9, 4, 8, 12)), (1, 499, (1, 9, 4, 8, 12))]
    assert torch.equal(latents[:, :6], context)
    assert latents[:, 6:].abs().max() == 0


def test_a_callback_can_interrupt(make_pipeline, embeds):
    pipe = make_pipeline()
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True
        return {}

    pipe(**embeds(), **{**FAST, "num_inference_steps": 5}, callback_on_step_end=stop)
    assert steps == [0]


@pytest.fixture
def seen(monkeypatch):
    """Notes what a pipeline's transformer is called with, and may answer in its place."""

    def watch(pipe, answer=None):
        calls, forward = [], pipe.transformer.forward

        def call(*args, **kwargs):
            calls.append(kwargs)
            return answer(**kwargs) if answer else forward(*args, **kwargs)

        monkeypatch.setattr(pipe.transformer, "forward", call)
        return calls

    return watch


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("in_a_list", [False, True])
def test_guidance_that_diffusers_callback_ends_midway_goes_on_with_the_prompt(
    make_pipeline, embeds, seen, batch_size, in_a_list
):
    pipe = make_pipeline()
    steps = {**FAST, "num_inference_steps": 4}
    text, latents = embeds(batch_size), {}

    def keep(pipeline, step, timestep, tensors):
        latents[step] = tensors["latents"]
        return tensors

    pipe(**text, **steps, generator=seeded(), callback_on_step_end=keep)  # guided throughout
    calls = seen(pipe)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    callback = MultiPipelineCallbacks([callback]) if in_a_list else callback
    pipe(**text, **steps, generator=seeded(), callback_on_step_end=callback)
    assert [len(call["hidden_states"]) // batch_size for call in calls] == [2, 2, 1, 1]
    assert torch.equal(calls[2]["hidden_states"], latents[1])
    assert torch.equal(calls[2]["encoder_hidden_states"], text["prompt_embeds"].flatten(1, 2))


def test_a_callback_can_switch_guidance_on_and_change_it(make_pipeline, small_pipeline, embeds, seen):
    def guide(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 3.0
        return {}

    for use_dynamic_cfg in (False, True):
        pipe = make_pipeline()
        calls = seen(pipe)
        arguments = {**embeds(), **FAST, "guidance_scale": 1.0, "use_dynamic_cfg": use_dynamic_cfg}
        pipe(**arguments, callback_on_step_end=guide)
        assert [len(call["hidden_states"]) for call in calls] == [1, 2]
    calls = seen(small_pipeline)
    small_pipeline(["a", "b"], **FAST, guidance_scale=1.0, callback_on_step_end=guide)
    assert [len(call["hidden_states"]) for call in calls] == [1, 2]
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0.*negative_prompt_embeds"):
        make_pipeline()(
            prompt_embeds=embeds()["prompt_embeds"], **FAST, guidance_scale=1.0, callback_on_step_end=guide
        )


def test_what_a_callback_returns_has_to_keep_its_shape(make_pipeline, embeds):
    for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
        with pytest.raises(ValueError, match=rf"callback's {name} .*\(2, .*\(1, "):
            make_pipeline()(
                **embeds(2),
                **FAST,
                callback_on_step_end=lambda pipe, step, t, tensors: {
                    key: value[-1:] for key, value in tensors.items()
                },
                callback_on_step_end_tensor_inputs=[name],
            )


@pytest.mark.parametrize(
    "callback, message",
    [
        (SD3CFGCutoffCallback(), "pooled_prompt_embeds"),
        (IPAdapterScaleCutoffCallback(), "IPAdapterScaleCutoffCallback"),
        (
            MultiPipelineCallbacks([SDCFGCutoffCallback(), IPAdapterScaleCutoffCallback()]),
            "IPAdapterScaleCutoffCallback",
        ),
    ],
)
def test_callbacks_for_other_pipelines_are_refused_at_once(make_pipeline, embeds, seen, callback, message):
    pipe = make_pipeline()
    calls = seen(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**embeds(), **FAST, callback_on_step_end=callback)
    assert not calls


# --- Schedulers, sizes, numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_schedulers_reach_what_the_model_predicts_and_give_it_clean_context(
    make_pipeline, embeds, scheduler_config, seen, scheduler_class, prediction_type
):
    rescale = prediction_type != "epsilon"  # which says nothing of the data where there is noise alone
    config = {**scheduler_config, "prediction_type": prediction_type, "rescale_betas_zero_snr": rescale}
    scheduler = scheduler_class.from_config(CogVideoXDDIMScheduler(**config).config)
    pipe = make_pipeline(scheduler=scheduler)
    context, target = random_context(), 2.0
    alphas = CogVideoXDDIMScheduler(**config).alphas_cumprod

    def exact(hidden_states, timestep, **kwargs):
        """What a model predicts for which all data are one number."""
        alpha = alphas[timestep.long()].repeat_interleave(3, dim=1)[..., None, None, None]
        noise = (hidden_states - alpha**0.5 * target) / (1 - alpha).clamp(min=1e-6) ** 0.5
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * target
        return (
            {"v_prediction": velocity, "epsilon": noise, "sample": torch.full_like(noise, target)}[prediction_type],
        )

    calls = seen(pipe, exact)
    arguments = {**embeds(), **FAST, "num_inference_steps": 25, "guidance_scale": 1.0, "context_latents": context}
    latents = pipe(**arguments, generator=seeded()).frames
    assert all(torch.equal(call["hidden_states"][:, :6], context) for call in calls)
    assert torch.equal(latents[:, :6], context)
    torch.testing.assert_close(latents[:, 6:], torch.full_like(latents[:, 6:], target), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_other_schedulers_are_refused_by_name(make_pipeline, embeds, seen, scheduler_class, scheduler_config):
    pipe = make_pipeline(scheduler=scheduler_class.from_config(CogVideoXDDIMScheduler(**scheduler_config).config))
    calls = seen(pipe)
    with pytest.raises(ValueError, match=f"{scheduler_class.__name__} .*CogVideoXDDIMScheduler.*DDIMScheduler"):
        pipe(**embeds(), **FAST)
    assert not calls


def test_a_scheduler_that_loses_the_noise_schedule_or_samples_flow_models_is_refused(
    make_pipeline, embeds, scheduler_config
):
    of_2b = CogVideoXDDIMScheduler(**{**scheduler_config, "snr_shift_scale": 3.0})
    pipe = make_pipeline(scheduler=DDIMScheduler.from_config(of_2b.config))
    with pytest.raises(ValueError, match=r"DDIMScheduler .*snr_shift_scale=3\.0.*CogVideoXDDIMScheduler"):
        pipe(**embeds(), **FAST)
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match=r"flow_prediction.*v_prediction"):
        make_pipeline(scheduler=flow)(**embeds(), **FAST)


def test_without_sizes_a_call_has_those_of_the_models_training(make_pipeline, embeds):
    latents = make_pipeline()(**embeds(), num_inference_steps=1, output_type="latent").frames
    assert latents.shape == (1, 9, 4, 8, 12)
    cogvideox_5b = make_pipeline(sample_height=60, sample_width=90, sample_frames=49)
    assert cogvideox_5b.fill_size(None, None, None) == (480, 720, 49)
    assert cogvideox_5b.fill_size(64, None, [9, 13]) == (64, 720, [9, 13])
    cogvideox_1_5 = make_pipeline(sample_height=96, sample_width=170, sample_frames=81, patch_size_t=2)
    assert cogvideox_1_5.fill_size(None, None, None) == (768, 1360, 85)
    cogvideox_1_5.video_shape(*cogvideox_1_5.fill_size(None, None, None), num_scenes=2)


def test_embeddings_latents_and_videos_hold_no_graph(small_pipeline, video):
    embeds = small_pipeline.encode_prompt([["a fox"]])
    latents = small_pipeline.encode_context([[video()]], [9], 64, 96)
    frames = small_pipeline.decode_latents(latents.requires_grad_(), [3], "pt")
    assert not (embeds.requires_grad or frames.requires_grad)


@pytest.mark.parametrize("part", ["latents", "pixels"])
def test_what_is_not_finite_is_not_decoded_and_the_scene_is_named(make_pipeline, monkeypatch, part):
    pipe = make_pipeline()
    latents = torch.zeros(1, 6, 4, 8, 12)
    if part == "latents":
        latents[0, 4, 0, 0, 0] = torch.nan
    else:
        decode = pipe.vae.decode
        monkeypatch.setattr(
            pipe.vae, "decode", lambda z: (z.abs().sum() and decode(z * torch.inf)) or decode(torch.zeros_like(z))
        )
        latents[:, 3:] = 1
    with pytest.raises(FloatingPointError, match=f"the {part} of scene 2 .*bfloat16"):
        pipe.decode_latents(latents, (3, 3))


def test_given_scenes_that_the_vae_makes_infinite_are_refused(make_pipeline, embeds, seen, video, monkeypatch):
    pipe = make_pipeline()
    calls = seen(pipe)
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encode(x * torch.nan))
    with pytest.raises(FloatingPointError, match="given scene 1"):
        pipe(**embeds(), **FAST, context_video=[video()])
    assert not calls


# --- Text -----------------------------------------------------------------------------------------------------------


def test_prompts_are_embedded_scene_by_scene(small_pipeline):
    embeds = small_pipeline.encode_prompt([["a fox", "a lake"], ["a lake", "a hut"]])
    config = small_pipeline.transformer.config
    assert embeds.shape == (2, 2, config.max_text_seq_length, config.text_embed_dim)
    assert torch.equal(embeds[0, 1], embeds[1, 0])
    assert not torch.equal(embeds[0, 0], embeds[0, 1])


def test_a_negative_prompt_is_shared_or_one_a_scene_or_one_a_scene_of_each_story(small_pipeline):
    prompts = [["a fox", "a lake"], ["a tram", "a hut"]]

    def run(negative):
        return small_pipeline(prompts, negative_prompt=negative, **FAST, generator=seeded()).frames

    shared = run("blurry")
    assert torch.equal(shared, run(["blurry", "blurry"]))
    assert torch.equal(shared, run([["blurry", "blurry"], ["blurry", "blurry"]]))
    assert not torch.equal(shared, run(["blurry", "dark"]))
    assert torch.equal(run(None), run(""))


def test_a_prompt_beyond_the_text_window_warns_and_quotes_what_is_cut_off(small_pipeline, caplog, monkeypatch):
    monkeypatch.setattr(mask2dit, "CUTS_WARNED_OF", set())
    window = small_pipeline.transformer.config.max_text_seq_length
    long = "a red fox walks " * window + "past the lighthouse"
    embeds = small_pipeline.encode_prompt([[long]])
    assert embeds.shape[2] == window
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "lighthouse" in record.getMessage() and str(window) in record.getMessage()
    caplog.clear()
    small_pipeline.encode_prompt([["a red fox"]])
    assert not caplog.records


def test_a_long_prompt_is_warned_of_once_whichever_pipeline_embeds_it(small_pipeline, caplog, monkeypatch):
    monkeypatch.setattr(mask2dit, "CUTS_WARNED_OF", set())
    other = Mask2DiTPipeline(**small_pipeline.components)
    long = "a red fox walks " * small_pipeline.transformer.config.max_text_seq_length
    for pipe in (small_pipeline, small_pipeline, other):
        pipe.encode_prompt([[long, f"{long} home"]])
    assert len(caplog.records) == 2


# --- Bad input ------------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "no prompt": ({"prompt": None}, "prompt or as prompt_embeds"),
    "an empty prompt list": ({"prompt": []}, "at least one scene"),
    "a prompt that is no list": ({"prompt": "a fox"}, "but is the text 'a fox'"),
    "a prompt that is no text": ({"prompt": ["a", 3]}, "3"),
    "prompt and embeddings": ({"prompt_embeds": torch.zeros(1, 3, 6, 24)}, "either as prompt or as prompt_embeds"),
    "stories with different scene counts": ({"prompt": [["a", "b"], ["a"]]}, "these have 2, 1"),
    "a negative that is no text": ({"negative_prompt": [1, 2, 3]}, "has to hold texts"),
    "context that is one array": ({"context_video": np.zeros((9, 4, 4, 3), np.uint8)}, r"array of the shape \(9, 4, 4, 3\)"),
    "a wrong number of negatives": ({"negative_prompt": ["x", "y"]}, "3 scenes .* but has 2"),
    "frames the VAE cannot carry": ({"num_frames": 50}, r"num_frames=50 has to be 1 \+ 4m .* 49 or 53"),
    "no frames": ({"num_frames": 0}, "the nearest is 1"),
    "negative frames": ({"num_frames": -9}, "the nearest is 1"),
    "a wrong number of frame counts": ({"num_frames": [9, 9]}, "2 entries for 3 scenes"),
    "a height the patch cannot carry": ({"height": 72}, "height=72 has to be a multiple of 16; the nearest is 64 or 80"),
    "no width": ({"width": 0}, "the nearest is 16"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0"),
    "an unknown output type": ({"output_type": "mp4"}, "np, pt, pil, latent, but is 'mp4'"),
    "more context than prompts": ({"context_latents": random_context(num_frames=9)}, "3 context scenes leave nothing"),
    "context of half a scene": ({"context_latents": random_context(num_frames=4)}, "4 latent frames, .* scenes of"),
    "context of a wrong size": ({"context_latents": torch.zeros(1, 6, 4, 8, 10)}, r"\(1, 6, 4, 8, 12\).*\(1, 6, 4, 8, 10\)"),
    "context twice": ({"context_latents": random_context(), "context_video": ["a"]}, "not both"),
    "context that is no list": ({"context_video": "a.mp4"}, "list with one video"),
    "no context videos": ({"context_video": []}, "empty"),
    "a mask of a wrong length": ({"scene_mask": [False, True]}, "2 entries for 3 scenes"),
    "a mask without context": ({"scene_mask": [False, True, True]}, "neither context_video nor context_latents"),
    "a mask against its context": ({"scene_mask": [False, False, True], "context_video": ["a"]}, "2 scenes as given, .* 1"),
    "noise of a wrong shape": ({"latents": torch.zeros(1, 6, 4, 8, 12)}, r"latents .*\(1, 9, 4, 8, 12\).*\(1, 6, 4, 8, 12\)"),
    "too few generators": ({"generator": [torch.Generator()] * 2}, "2 generators for 1 stories"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    "infinite guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    "eta beyond 1": ({"eta": 1.5}, "eta=1.5 .* between 0 and 1"),
    "eta that is no number": ({"eta": float("nan")}, "eta=nan"),
    "a LoRA scale that is no number": ({"attention_kwargs": {"scale": float("nan")}}, "scale.*nan"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 .* without a fraction"),
    "an unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["video"]}, "not video"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_ends_before_any_work_with_one_clear_sentence(make_pipeline, monkeypatch, arguments, message):
    pipe = make_pipeline()
    for part, name in (
        (pipe.vae, "encode"),
        (pipe.vae, "decode"),
        (pipe.transformer, "forward"),
        (pipe, "encode_prompt"),
    ):
        monkeypatch.setattr(part, name, lambda *args: pytest.fail("expensive work was begun"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        pipe(**{"prompt": ["a", "b", "c"], **FAST, **arguments})
    assert "\n" not in str(error.value)


def test_without_a_text_encoder_texts_are_refused(make_pipeline, embeds):
    with pytest.raises(ValueError, match="no text encoder"):
        make_pipeline()(["a", "b"], **FAST)
    with pytest.raises(ValueError, match="with guidance, negative_prompt_embeds too"):
        make_pipeline()(prompt_embeds=embeds()["prompt_embeds"], **FAST)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_of_a_wrong_shape_are_refused(make_pipeline, embeds, name):
    with pytest.raises(ValueError, match=rf"{name} .*\(1, 3, 6, 24\).*\(1, 3, 6, 25\)"):
        make_pipeline()(**{**embeds(), name: torch.zeros(1, 3, 6, 25)}, **FAST)
    with pytest.raises(ValueError, match=r"prompt_embeds has to be \(stories, scenes"):
        make_pipeline()(prompt_embeds=torch.zeros(3, 6, 24), **FAST)


def test_an_odd_number_of_latent_frames_is_refused_on_cogvideox_1_5_with_the_next_size(make_pipeline):
    pipe = make_pipeline(patch_size_t=2, sample_frames=13)
    with pytest.raises(ValueError, match=r"num_frames=49 .* m \+ 1 a multiple of 2.* 45 or 53"):
        pipe(["a"], **{**FAST, "num_frames": 49})


def test_a_missing_context_video_is_named(make_pipeline, embeds):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        make_pipeline()(**embeds(), **FAST, context_video=["nowhere.mp4"])


def test_a_context_video_that_is_too_short_says_how_long_it_has_to_be(make_pipeline, embeds, video):
    with pytest.raises(ValueError, match=r"short\.mp4.*5.*9"):
        make_pipeline()(**embeds(), **FAST, context_video=[video("short.mp4", 5)])


# --- Folders, LoRA, offload -----------------------------------------------------------------------------------------


def test_a_folder_is_read_with_and_without_a_model_index_or_with_a_foreign_one(small_model, tmp_path):
    expected = Mask2DiTPipeline.from_pretrained(small_model)(["a", "b"], **FAST, generator=seeded()).frames
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "vae": ["nowhere", "NoSuchVAE"]}')
    assert torch.equal(
        Mask2DiTPipeline.from_pretrained(folder)(["a", "b"], **FAST, generator=seeded()).frames, expected
    )
    (folder / "model_index.json").unlink()
    pipe = Mask2DiTPipeline.from_pretrained(folder, mask_variant="v5", torch_dtype=torch.bfloat16)
    assert pipe.transformer.config.mask_variant == "v5"
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_a_pipeline_that_is_saved_comes_back(small_pipeline, tmp_path):
    expected = small_pipeline(["a", "b"], **FAST, generator=seeded()).frames
    small_pipeline.save_pretrained(tmp_path)
    again = Mask2DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(["a", "b"], **FAST, generator=seeded()).frames, expected)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"])
def test_a_missing_part_of_a_folder_is_named(small_model, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    shutil.rmtree(folder / part)
    for read in (Mask2DiTPipeline.from_pretrained, Mask2DiTPipeline.skeleton):
        with pytest.raises(FileNotFoundError, match=part):
            read(folder)


def test_components_can_be_handed_over_and_other_keywords_are_refused(small_model, tiny_vae):
    pipe = Mask2DiTPipeline.from_pretrained(small_model, vae=tiny_vae, text_encoder=None)
    assert pipe.vae is tiny_vae and pipe.text_encoder is None
    with pytest.raises(TypeError, match=r"'vea' .* tokenizer, text_encoder, vae"):
        Mask2DiTPipeline.from_pretrained(small_model, vea=tiny_vae)


def test_a_skeleton_has_the_sizes_of_the_model_and_no_weights(small_model, small_pipeline):
    skeleton = Mask2DiTPipeline.skeleton(small_model)
    assert skeleton.video_shape(64, 96, 9, 3) == small_pipeline.video_shape(64, 96, 9, 3)
    assert {parameter.device.type for parameter in skeleton.transformer.parameters()} == {"meta"}


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_corrupt_part_of_a_folder_is_found_before_anything_is_loaded(small_model, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / part).write_bytes((folder / part).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{Path(part).name}.*fetch it again"):
        Mask2DiTPipeline.skeleton(folder)


def test_a_lora_is_saved_loaded_scaled_and_removed(make_pipeline, embeds, tmp_path):
    pipe = make_pipeline()
    plain = pipe(**embeds(), **FAST, generator=seeded()).frames
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))

    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    full = pipe(**embeds(), **FAST, generator=seeded()).frames
    pipe.set_adapters("style", 0.5)
    half = pipe(**embeds(), **FAST, generator=seeded()).frames
    pipe.unload_lora_weights()
    assert (full - plain).abs().max() > 1e-3
    assert 1e-4 < (half - plain).abs().mean() < (full - plain).abs().mean()
    assert torch.equal(pipe(**embeds(), **FAST, generator=seeded()).frames, plain)


LORA_FORMS = {
    "diffusers": lambda name: (f"transformer.{name}", "lora_A", "lora_B"),
    "PEFT": lambda name: (f"base_model.model.{name}", "lora_A", "lora_B"),
    "ComfyUI": lambda name: (f"diffusion_model.{name}", "lora_A", "lora_B"),
    "VideoX-Fun": lambda name: (f"lora_unet__{name.replace('.', '_')}", "lora_down", "lora_up"),
}


def test_one_lora_in_every_form_gives_the_same_video_with_its_alphas(make_pipeline, embeds, tmp_path):
    modules = {"transformer_blocks.0.attn1.to_q": 4, "transformer_blocks.1.attn1.to_out.0": 2}  # and their alphas
    weights = {
        name: (torch.randn(2, 32, generator=seeded(1)), torch.randn(32, 2, generator=seeded(2))) for name in modules
    }

    def run(form, alphas):
        state = {}
        for name, (down, up) in weights.items():
            prefix, down_name, up_name = LORA_FORMS[form](name)
            state |= {f"{prefix}.{down_name}.weight": down, f"{prefix}.{up_name}.weight": up}
            if alphas:
                state[f"{prefix}.alpha"] = torch.tensor(float(modules[name]))
        save_file(state, tmp_path / "lora.safetensors")
        pipe = make_pipeline()
        pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style")
        return pipe(**embeds(), **FAST, generator=seeded()).frames

    merged = make_pipeline()
    for name, alpha in modules.items():
        down, up = weights[name]
        merged.transformer.get_submodule(name).weight.data += alpha / 2 * up @ down
    expected = merged(**embeds(), **FAST, generator=seeded()).frames
    plain = run("diffusers", alphas=False)
    assert (plain - expected).abs().max() > 1e-2
    for form in LORA_FORMS:
        torch.testing.assert_close(run(form, alphas=True), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(run(form, alphas=False), plain)


def test_a_lora_that_peft_saved_keeps_the_alphas_of_its_config(make_pipeline, embeds, tmp_path):
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 1}, init_lora_weights=False
    )
    model = get_peft_model(make_pipeline().transformer, config)
    model.save_pretrained(tmp_path)
    merged = make_pipeline(model.merge_and_unload())
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(
        pipe(**embeds(), **FAST, generator=seeded()).frames,
        merged(**embeds(), **FAST, generator=seeded()).frames,
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(make_pipeline):
    pipe = make_pipeline()
    module = "transformer.transformer_blocks.9.attn1.to_q"
    with pytest.raises(ValueError, match="10 layers"):
        pipe.load_lora_weights(
            {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
        )
    assert not pipe.get_list_adapters()


# --- Dtypes and variants of components --------------------------------------------------------------------------------


def test_a_dictionary_gives_each_component_its_dtype(small_model):
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16, "text_encoder": torch.float32}
    pipe = Mask2DiTPipeline.from_pretrained(small_model, torch_dtype=dtypes)
    assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    )
    assert Mask2DiTPipeline.from_pretrained(small_model, torch_dtype={"vae": torch.float16}).transformer.dtype == (
        torch.float32
    )


@pytest.mark.parametrize(
    "dtype, message",
    [
        ("bfloat16", "'bfloat16'"),
        ({"transformer": "bfloat16"}, "'bfloat16'"),
        ({"transfomer": torch.bfloat16}, "'transfomer'.* text_encoder, vae, transformer, default"),
    ],
)
def test_what_names_no_dtype_is_refused_and_does_not_become_float32(small_model, dtype, message):
    with pytest.raises(ValueError, match=message):
        Mask2DiTPipeline.from_pretrained(small_model, torch_dtype=dtype)


@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
def test_a_folder_of_a_variant_and_one_that_holds_both_load_what_is_asked_for(small_model, tmp_path, shard_size):
    pipe = Mask2DiTPipeline.from_pretrained(small_model)
    plain = pipe.transformer.proj_out.bias.detach().clone()
    pipe.save_pretrained(tmp_path / "both", max_shard_size=shard_size)
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder):
        component.half()
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, 2.0)
    torch.nn.init.constant_(pipe.text_encoder.encoder.final_layer_norm.weight, 2.0)
    for name in ("both", "variant"):
        pipe.save_pretrained(tmp_path / name, variant="fp16", max_shard_size=shard_size)

    for folder, variant, is_plain in (("both", None, True), ("both", "fp16", False), ("variant", "fp16", False)):
        read = Mask2DiTPipeline.from_pretrained(tmp_path / folder, variant=variant)
        assert torch.equal(read.transformer.proj_out.bias, plain if is_plain else torch.full_like(plain, 2.0))
        assert bool((read.text_encoder.encoder.final_layer_norm.weight == 2).all()) != is_plain
    Mask2DiTPipeline.skeleton(tmp_path / "both")
    Mask2DiTPipeline.skeleton(tmp_path / "variant")
    with pytest.raises(FileNotFoundError, match="'bf16'"):
        Mask2DiTPipeline.from_pretrained(tmp_path / "both", variant="bf16")


def test_components_without_the_variant_load_their_plain_weights(small_model, tmp_path):
    pipe = Mask2DiTPipeline.from_pretrained(small_model)
    pipe.save_pretrained(tmp_path)
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, 2.0)
    pipe.transformer.save_pretrained(tmp_path / "transformer", variant="ema")
    read = Mask2DiTPipeline.from_pretrained(tmp_path, variant="ema")
    assert (read.transformer.proj_out.bias == 2).all()


def test_the_vae_is_let_go_between_encoding_context_and_denoising(make_pipeline, embeds, video, monkeypatch):
    pipe = make_pipeline()
    events = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: events.append("free"))
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *args, **kwargs: events.append("step") or forward(*args, **kwargs)
    )
    pipe(**embeds(), **FAST, context_video=[video()])
    assert events == ["free", "step", "step", "free"]


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=1e9),
    "attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "magnitude": lambda pipe: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=5, mag_ratios=[1.0] * 5
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"transformer_blocks\.\d\.attn1"]
    ),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_a_call_after_an_interrupted_one_equals_a_fresh_pipelines(make_pipeline, embeds, cache, error):
    arguments = {**embeds(), **FAST, "num_inference_steps": 5}

    def cached():
        pipe = make_pipeline()
        pipe.transformer.enable_cache(cache(pipe))
        return pipe

    expected = cached()(**arguments, generator=seeded()).frames
    assert not torch.equal(
        expected, make_pipeline()(**arguments, generator=seeded()).frames
    )  # the cache does something

    def fail(pipeline, step, timestep, tensors):
        if step == 2:
            raise error
        return {}

    pipe = cached()
    with pytest.raises(error):
        pipe(**arguments, generator=seeded(1), callback_on_step_end=fail)
    assert pipe.current_timestep is None
    assert torch.equal(pipe(**arguments, generator=seeded()).frames, expected)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_failure_in_any_part_takes_offloaded_weights_back(make_pipeline, embeds, video, monkeypatch, part):
    pipe = make_pipeline()
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

    def fail(*args, **kwargs):
        freed.clear()
        raise RuntimeError

    monkeypatch.setattr(getattr(pipe, part), {"transformer": "forward", "vae": "encode"}[part], fail)
    with pytest.raises(RuntimeError):
        pipe(**embeds(), **FAST, context_video=[video()])
    assert freed
    freed.clear()
    if part == "vae":
        with pytest.raises(RuntimeError):
            pipe.encode_context([[video()]], [9], 64, 96)
        assert freed


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_caches_go_on_where_guidance_ends_midway(make_pipeline, embeds, cache):
    pipe = make_pipeline()
    if isinstance(cache(pipe), FasterCacheConfig):
        pytest.skip("FasterCache takes half of every batch for the unconditional one")
    if isinstance(cache(pipe), MagCacheConfig):
        pytest.skip("MagCache counts steps, which test_step_cache.py tests")
    pipe.transformer.enable_cache(cache(pipe))
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    latents = pipe(**embeds(), **{**FAST, "num_inference_steps": 5}, callback_on_step_end=callback).frames
    assert latents.shape == (1, 9, 4, 8, 12) and latents.isfinite().all()
