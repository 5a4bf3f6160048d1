"""Training of LoRA's additions, over plain and over quantized frozen weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mask2dit import Mask2DiTPipeline
from mask2dit.training import checkpoints
from mask2dit.training.config import LoRATrainingConfig
from mask2dit.training.memory import estimate_memory
from mask2dit.training.run import load_pipeline

FORMS = ("int8", "fp8")


@pytest.fixture
def lora_config(config):
    def make(quantization: str | None = None, **changes):
        if quantization is not None:
            pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        defaults = {"lora": LoRATrainingConfig(rank=2), "learning_rate": 0.05, "max_steps": 3, "checkpoint_every": 100}
        return config(**{**defaults, "quantization": quantization, **changes})

    return make


def additions(config) -> torch.Tensor:
    weights = load_file(Path(config.output_dir) / "lora" / "pytorch_lora_weights.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lora_trained_over_quantized_weights_is_close_to_one_over_plain_weights(
    lora_config, run, tmp_path, metrics, form, precision
):
    trained, losses = [], []
    for name, quantization in (("plain", None), ("quantized", form)):
        run_config = lora_config(quantization, output_dir=str(tmp_path / name), precision=precision)
        run(run_config)
        trained.append(additions(run_config))
        losses.append(torch.tensor([line["loss"] for line in metrics(run_config)]))
    assert 0 < (losses[1] - losses[0]).abs().max() < 0.02 * losses[0].mean()
    # AdamW's steps have the same size whatever a gradient's, so that few of the smallest change their sign.
    assert torch.nn.functional.cosine_similarity(*trained, dim=0) > 0.8


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_checkpoints_hold_the_additions_alone_and_a_resumed_run_repeats_the_steps(
    lora_config, run, tmp_path, quantization
):
    whole = lora_config(quantization, output_dir=str(tmp_path / "whole"), ema_decay=0.5)
    run(whole)
    parts = replace(whole, output_dir=str(tmp_path / "parts"), max_steps=2, checkpoint_every=2)
    run(parts)
    (checkpoint,) = checkpoints.checkpoints(parts.output_dir)
    assert not (checkpoint / "model.safetensors").exists()
    names = set(load_file(checkpoint / checkpoints.ADDITIONS))
    assert names and all("lora_" in name for name in names)
    run(replace(parts, max_steps=3, resume="latest"))
    assert additions(parts).equal(additions(whole))


@pytest.mark.parametrize("form", FORMS)
def test_additions_over_quantized_weights_load_on_plain_ones(lora_config, run, small_model, form):
    trained = lora_config(form)
    run(trained)
    pipe = Mask2DiTPipeline.from_pretrained(small_model)
    pipe.load_lora_weights(Path(trained.output_dir) / "lora")
    loaded = [weight for name, weight in pipe.transformer.named_parameters() if "lora_B" in name]
    assert loaded and any(weight.abs().max() > 0.01 for weight in loaded)


@pytest.mark.slow
def test_two_processes_train_additions_over_quantized_weights_as_one_does(lora_config, launch, run, tmp_path, metrics):
    alone = lora_config("int8", output_dir=str(tmp_path / "alone"))
    run(alone)
    shared = replace(alone, output_dir=str(tmp_path / "shared"))
    result = launch(shared, processes=2)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(additions(shared), additions(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_estimate_counts_the_bytes_that_quantized_weights_take(lora_config, small_model, stored_bytes, form):
    run_config = lora_config(form, precision="bf16")
    skeleton = Mask2DiTPipeline.skeleton(small_model)
    estimate = estimate_memory(run_config, skeleton, 1)
    transformer = load_pipeline(run_config, skeleton).transformer
    copies = 2 * estimate.trainable  # of autocast, while a step runs
    assert stored_bytes(transformer) + copies == pytest.approx(estimate.weights, rel=0.02)
    plain = estimate_memory(replace(run_config, quantization=None), Mask2DiTPipeline.skeleton(small_model), 1)
    assert estimate.weights < 0.4 * plain.weights


def test_the_estimate_counts_copies_of_frozen_weights_for_blocks_that_are_not_checkpointed(lora_config, small_model):
    skeleton = Mask2DiTPipeline.skeleton(small_model)
    in_all, in_every_other, in_none = (
        estimate_memory(lora_config(precision="bf16", gradient_checkpointing=interval), skeleton, 1).weights
        for interval in (1, 2, 0)
    )
    assert in_all < in_every_other < in_none


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora": LoRATrainingConfig()}, "int8 .*lora.rank"),
        ({"quantization": "int4"}, "quantization .*int4"),
        ({"deepspeed": "configs/deepspeed/zero2.json"}, "int8 .*deepspeed"),
    ],
)
def test_quantization_that_cannot_be_trained_on_is_refused(lora_config, changes, message):
    with pytest.raises(ValueError, match=message):
        lora_config(**{"quantization": "int8", **changes})


def test_forms_of_a_gpu_are_refused_without_one(lora_config, run):
    with pytest.raises(ValueError, match="nf4 needs a CUDA GPU"):
        run(lora_config("nf4"))


def test_a_folder_that_was_saved_quantized_is_refused(lora_config, run, small_model, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(small_model, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match="saved quantized"):
        run(lora_config(model=str(folder)))
