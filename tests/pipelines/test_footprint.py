"""Predicted memory against the bytes that torch's allocator hands out on the CPU."""

import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mask2dit import cli
from mask2dit.data.config import DataConfig
from mask2dit.inference import dry_run, run
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.dry_run import describe_needs
from mask2dit.models.loading import empty_text_encoder, select_sampler
from mask2dit.pipelines import footprint
from mask2dit.pipelines.footprint import (
    GIB,
    Footprint,
    LiveBytes,
    Step,
    WeightSizes,
    count_steps,
    measure,
    predict_footprint,
)
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.memory import MEMORY_MODES, enable_vae_tiling
from mask2dit.pipelines.story import plan_windows
from mask2dit.training.utilisation import training_flops


@pytest.fixture
def allocated(monkeypatch):
    """The peak of bytes that a computation allocates on the CPU, as the benchmarks count it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("attention")
    return torch.no_grad()(lambda compute: benchmark.peak_extra_memory(compute, "cpu"))


def predict(pipe, folder, num_scenes, given=(), **options) -> Footprint:
    size = options.pop("size", (None, None, None))
    size = pipe.fill_size(*size)
    steps = count_steps(range(options.pop("num_inference_steps", 2)), options.pop("guided", True))
    return predict_footprint(
        pipe,
        empty_text_encoder(folder / "text_encoder"),
        pipe.video_shape(*size, num_scenes),
        plan_windows(pipe, ["a"] * num_scenes, given, None, *size),
        **{"dtype": torch.float32, "steps": steps, **options},
    )


@pytest.mark.parametrize(
    "size, num_scenes, guided, variant",
    [
        ((128, 192, 9), 3, True, "v2"),
        ((256, 192, 9), 2, False, "v5"),
        ((128, 128, [17, 9, 33]), 3, True, "v3"),
        ((256, 256, 9), 1, True, "v2"),
    ],
)
def test_activations_of_the_transformer_are_predicted_within_a_tenth(
    allocated, small_model, size, num_scenes, guided, variant
):
    pipe = Mask2DiTPipeline.from_pretrained(small_model, mask_variant=variant)
    shape = pipe.video_shape(*size, num_scenes)
    branches, config = 2 if guided else 1, pipe.transformer.config

    def step():
        latents = torch.randn(1, sum(shape.latent_frames), *shape.latent_size)
        pipe.transformer(
            torch.cat([latents] * branches),
            torch.randn(branches, num_scenes * config.max_text_seq_length, config.text_embed_dim),
            torch.ones(branches, num_scenes, dtype=torch.long),
            scene_frames=shape.latent_frames,
        )

    skeleton = Mask2DiTPipeline.skeleton(small_model)
    skeleton.register_modules(transformer=pipe.transformer)
    predicted = predict(skeleton, small_model, num_scenes, size=size, guided=guided).activations["transformer"]
    assert predicted == pytest.approx(allocated(step), rel=0.1)


@pytest.mark.parametrize("size, tiling", [((64, 96, 17), False), ((128, 64, 9), False), ((128, 96, 9), True)])
def test_activations_of_decoding_are_predicted_but_for_workspaces_of_convolutions(
    small_pipeline, small_model, size, tiling
):
    vae, shape = small_pipeline.vae, small_pipeline.video_shape(*size, 1)
    if tiling:
        enable_vae_tiling(vae)
    channels, height, width = shape.latent_size

    with LiveBytes() as memory, torch.no_grad():
        vae.decode(torch.randn(1, channels, shape.latent_frames[0], height, width))
    predicted = predict(small_pipeline, small_model, 1, size=size, vae_tiling=tiling).activations["vae"]
    assert predicted == pytest.approx(memory.peak, rel=0.1)


def test_activations_of_the_text_encoder_are_predicted_within_a_tenth(allocated, small_pipeline, small_model):
    predicted = predict(small_pipeline, small_model, 3).activations["text_encoder"]
    ids = torch.zeros(3, 64, dtype=torch.long)
    assert predicted == pytest.approx(allocated(lambda: small_pipeline.text_encoder(ids)), rel=0.1)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_weights_are_those_of_the_loaded_model_stored_in_8_bits_too(small_pipeline, small_model, name):
    module = getattr(small_pipeline, name)
    predicted = predict(small_pipeline, small_model, 1).weights[name]
    assert predicted.total == sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    if name == "transformer":
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert predicted.fp8 == sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
        assert predicted.fp8 < predicted.total


def test_operations_are_those_that_training_counts_times_steps_and_guidance(small_pipeline, small_model):
    data = DataConfig(num_scenes=3, num_frames=9, height=64, width=96)
    forward = training_flops(Mask2DiTPipeline.skeleton(small_model), data) / 3
    plain = predict(small_pipeline, small_model, 3, guided=False, num_inference_steps=5)
    guided = predict(small_pipeline, small_model, 3, guided=True, num_inference_steps=5)
    assert plain.flops["transformer"] == 5 * forward
    assert guided.flops["transformer"] == 10 * forward
    assert guided.flops["vae"] == plain.flops["vae"] > 0


@pytest.mark.parametrize("context_guidance", [False, True])
@pytest.mark.parametrize(
    "context_refresh, guidance_interval", [(1, None), (3, None), (1, (200, 700)), (3, (200, 700))]
)
def test_operations_of_kept_context_and_of_guidance_are_those_that_a_run_counts(
    small_pipeline, small_model, context_refresh, guidance_interval, context_guidance
):
    settings = {"context_refresh": context_refresh, "guidance_interval": guidance_interval}
    small_pipeline.scheduler = select_sampler(small_pipeline.scheduler, "dpm")
    config, shape = small_pipeline.transformer.config, small_pipeline.video_shape(64, 64, (9, 17, 9), 3)
    embeds = torch.randn(2, 1, 3, config.max_text_seq_length, config.text_embed_dim)
    # torch counts the matrix products of plain attention, but not the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small_pipeline(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            context_latents=torch.randn(1, shape.latent_frames[0] + shape.latent_frames[2], *shape.latent_size),
            scene_mask=[False, True, False],
            height=64,
            width=64,
            num_frames=shape.frames,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            context_guidance=context_guidance,
            **settings,
        )
    steps = count_steps(small_pipeline.scheduler.timesteps.tolist(), True, **settings)
    options = {"size": (64, 64, (9, 17, 9)), "steps": steps, "context_guidance": context_guidance}
    predicted = predict(small_pipeline, small_model, 3, given=(0, 2), **options)
    assert predicted.flops["transformer"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_steps_are_counted_by_their_guidance_and_the_scenes_that_they_compute():
    timesteps = [900, 700, 500, 300, 100]
    assert count_steps(timesteps, True) == {Step(True, True): 5}
    assert count_steps(timesteps, False, (0, 1000), 2) == {Step(False, True): 3, Step(False, False): 2}
    # Steps 0 and 4 are due, step 1 begins guidance, step 3 ends it.
    expected = {Step(False, True): 3, Step(True, True): 1, Step(True, False): 1}
    assert count_steps(timesteps, True, (500, 700), 4) == expected


def test_guidance_on_two_processes_halves_the_operations_of_guided_steps(small_pipeline, small_model):
    steps = {Step(True, True): 2, Step(False, True): 3}
    both, one = (predict(small_pipeline, small_model, 2, steps=steps, cfg=cfg).flops["transformer"] for cfg in (1, 2))
    assert both / one == 7 / 5


def test_attention_is_predicted_without_a_matrix_of_scores():
    def attend():
        query, key, value = (torch.empty(1, 1, 4096, 16, device="meta") for _ in range(3))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    cost = measure(attend)
    assert cost.flops == 4 * 4096**2 * 16
    assert cost.peak < 5 * 4096 * 16 * 4


def test_the_context_cache_takes_memory_where_it_is_kept_and_given_scenes_are_encoded(small_pipeline, small_model):
    plain = predict(small_pipeline, small_model, 3, size=(64, 64, 9))
    options = {"given": (0, 2), "context_cache": GIB, "size": (64, 64, 9)}
    on_gpu = predict(small_pipeline, small_model, 3, **options)
    in_main = predict(small_pipeline, small_model, 3, **options, context_cache_on_gpu=False)
    assert on_gpu.on_gpu("full") > GIB
    assert in_main.on_gpu("full") < on_gpu.on_gpu("full") - GIB // 2
    assert in_main.in_main_memory("full") == on_gpu.in_main_memory("full") + GIB
    assert on_gpu.flops["vae"] != plain.flops["vae"]


BIG = Footprint(
    weights={
        "text_encoder": WeightSizes(9 * GIB, GIB // 4, 9 * GIB, 9 * GIB),
        "transformer": WeightSizes(10 * GIB, GIB // 8, GIB, 5 * GIB),
        "vae": WeightSizes(GIB // 2, GIB // 64, GIB // 2, GIB // 2),
    },
    activations={"text_encoder": GIB // 8, "transformer": 8 * GIB, "vae": 4 * GIB},
    frames=GIB // 4,
    flops={"text_encoder": 1, "transformer": 1, "vae": 1},
)


def test_each_mode_takes_less_than_the_one_before_and_all_are_predicted():
    assert set(footprint.PREFERRED) == set(MEMORY_MODES)
    peaks = [
        BIG.on_gpu(mode) / GIB for mode in ("full", "model_offload", "fp8", "group_offload", "sequential_offload")
    ]
    assert peaks == [27.5, 18, 13.125, 9, 8.125]
    assert BIG.in_main_memory("full") == 19.75 * GIB
    assert BIG.fitting(24 * GIB) == ["model_offload", "group_offload", "fp8", "sequential_offload"]
    assert BIG.fitting(8 * GIB) == []


def test_a_dry_run_reads_no_weights_and_names_every_mode(small_model, tmp_path, capsys):
    folder = tmp_path / "configs"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "spiece.model"))
    config = InferenceConfig(
        model=str(folder), prompts=["a", "b", "c"], context_videos=["not there.mp4"], dry_run=True, device="cpu"
    )
    assert run.generate(config) is None
    printed = capsys.readouterr().out
    assert all(mode in printed for mode in MEMORY_MODES)
    assert "3 scenes (1 given) of 9 frames at 64x96" in printed
    assert "80 GB: memory=full" in describe_needs(config, torch.device("cpu"))
    changes = {"context_refresh": 5, "guidance_interval": [190, 790], "cache": "first_block"}
    lines = describe_needs(dataclasses.replace(config, **changes), torch.device("cpu")).splitlines()
    assert "guided steps: 30 of 50" in lines
    assert "steps that compute given scenes: 12 of 50" in lines
    assert any("cache=first_block" in line for line in lines)


@pytest.fixture
def tiny_gpu(monkeypatch):
    """A GPU with too little memory for anything but the small model."""
    monkeypatch.setattr(dry_run, "_capacity", lambda device: int(1.05 * 2**24) + GIB)


def test_a_mode_that_does_not_fit_is_refused_with_those_that_do(tiny_gpu):
    config = InferenceConfig(prompts=["a"], memory="full")
    with pytest.raises(ValueError, match=r"memory=full .*27\.5 GiB.*no memory mode.*check_memory=false"):
        dry_run.check_fits(config, BIG, torch.device("cuda"))


def test_an_error_of_too_little_memory_ends_with_the_modes_that_fit(monkeypatch, small_model):
    monkeypatch.setattr(dry_run, "_capacity", lambda device: 24 * GIB)
    monkeypatch.setattr(run, "predict", lambda *args: BIG)
    config = InferenceConfig(model=str(small_model), prompts=["a"], device="cpu")
    plan = run.plan_generation(config, torch.device("cpu"))
    expected = pytest.raises(MemoryError, match=r"^CUDA out of memory.*memory=model_offload \(18\.0 GiB\)")
    with expected, run.modes_named(plan, torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")


def test_without_a_gpu_main_memory_decides_and_only_its_modes_are_named(monkeypatch):
    assert [BIG.on_cpu(mode) / GIB for mode in footprint.CPU_MODES] == [27.75, 22.875]
    config = InferenceConfig(prompts=["a"], memory="full")
    monkeypatch.setattr(dry_run, "_capacity", lambda device: 24 * GIB)
    with pytest.raises(
        ValueError, match=r"27\.8 GiB.* 24\.0 GiB of main memory: predicted to fit: memory=fp8 \(22\.9 GiB\);"
    ):
        dry_run.check_fits(config, BIG, torch.device("cpu"))
    monkeypatch.setattr(dry_run, "_capacity", lambda device: 28 * GIB)
    dry_run.check_fits(config, BIG, torch.device("cpu"))


def test_a_size_beyond_main_memory_is_refused_before_weights_load(small_model, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda *args: pytest.fail("weights were read"))
    settings = [f"model={small_model}", "prompts=[a]", "device=cpu", "num_frames=9", "height=4096", "width=4096"]
    monkeypatch.setattr(dry_run, "_capacity", lambda device: 4 * GIB)
    assert cli.main(["generate", *settings]) == 1
    assert "no memory mode is predicted to fit: use vae_tiling=true" in capsys.readouterr().err


def test_a_size_that_the_vae_cannot_code_as_a_whole_is_refused_with_a_remedy(small_pipeline, small_model, monkeypatch):
    def fail(*args):
        raise RuntimeError("Kernel size can't be greater than actual input size")

    monkeypatch.setattr(footprint, "_decoding", fail)
    with pytest.raises(ValueError, match=r"64x96 pixels.* vae_tiling=true"):
        predict(small_pipeline, small_model, 1)


def test_an_error_of_too_little_main_memory_ends_with_the_modes_that_fit(monkeypatch, small_model):
    monkeypatch.setattr(dry_run, "_capacity", lambda device: 24 * GIB)
    monkeypatch.setattr(run, "predict", lambda *args: BIG)
    device = torch.device("cpu")
    plan = run.plan_generation(InferenceConfig(model=str(small_model), prompts=["a"], device="cpu"), device)
    with pytest.raises(MemoryError, match=r"can't allocate memory.*memory=fp8"), run.modes_named(plan, device):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="a defect"), run.modes_named(plan, device):
        raise RuntimeError("a defect")


def test_processes_that_share_a_pass_need_a_share_of_its_memory_and_operations(small_pipeline, small_model):
    size = {"size": (128, 192, 9)}
    alone, shared = (predict(small_pipeline, small_model, 3, ulysses=n, **size).activations for n in (1, 2))
    assert 0.5 < shared["transformer"] / alone["transformer"] < 0.8
    alone, shared = (predict(small_pipeline, small_model, 3, ulysses=n, **size).flops for n in (1, 2))
    assert 0.5 < shared["transformer"] / alone["transformer"] < 0.6
    assert small_pipeline.transformer.ulysses_group is None
