import json

import pytest
import torch
from peft import LoraConfig

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.config import load_config
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.run import plan_generation, weights_identity
from mask2dit.models.loading import empty_text_encoder, load_text_encoder
from mask2dit.models.quantization import FORMS, check_quantization, quantized_bytes

pytest.importorskip("torchao.quantization", reason="torchao is not installed")
ERRORS = {"int8": 0.02, "fp8": 0.08}  # relative, of a random model in bfloat16


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 6, 16, 8, 12, generator=generator).bfloat16(),
        torch.randn(1, 128, 64, generator=generator).bfloat16(),
        torch.tensor([[500, 0]]),
    )


@pytest.mark.parametrize("form", ERRORS)
def test_a_quantized_transformer_stays_close_takes_the_predicted_bytes_and_comes_back(
    small_model, tmp_path, inputs, stored_bytes, form
):
    plain = Mask2DiTTransformer3DModel.from_pretrained(small_model, torch_dtype=torch.bfloat16)
    quantized = Mask2DiTTransformer3DModel.from_pretrained(small_model, torch_dtype=torch.bfloat16, quantization=form)
    with torch.no_grad():
        expected, found = plain(*inputs).sample, quantized(*inputs).sample
    assert 0 < (found - expected).float().norm() / expected.float().norm() < ERRORS[form]
    assert stored_bytes(quantized) == pytest.approx(quantized_bytes(plain, form), rel=0.02)
    assert stored_bytes(quantized) < 0.65 * stored_bytes(plain)

    quantized.save_pretrained(tmp_path)
    again = Mask2DiTTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        assert again(*inputs).sample.equal(found)
    with pytest.raises(ValueError, match="quantized already"):
        Mask2DiTTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization=form)


@pytest.mark.parametrize("form", ERRORS)
def test_a_quantized_text_encoder_stays_close_and_is_refused_if_it_is_quantized_already(small_model, tmp_path, form):
    folder, ids = small_model / "text_encoder", torch.tensor([[3, 4, 5, 1]])
    plain = load_text_encoder(folder, torch.bfloat16)
    quantized = load_text_encoder(folder, torch.bfloat16, quantization=form)
    with torch.no_grad():
        expected, found = plain(ids)[0].float(), quantized(ids)[0].float()
    assert 0 < (found - expected).norm() / expected.norm() < ERRORS[form]
    (tmp_path / "config.json").write_text(json.dumps({**plain.config.to_dict(), "quantization_config": {"a": 1}}))
    with pytest.raises(ValueError, match="quantized already"):
        load_text_encoder(tmp_path, torch.bfloat16, quantization=form)
    assert quantized_bytes(empty_text_encoder(folder), form) < quantized_bytes(empty_text_encoder(folder), None)


@pytest.mark.parametrize("form", ERRORS)
def test_gradients_of_a_lora_over_a_quantized_base_are_within_its_error(small_model, inputs, form):
    gradients = {}
    for quantization in (None, form):
        model = Mask2DiTTransformer3DModel.from_pretrained(
            small_model, torch_dtype=torch.bfloat16, quantization=quantization
        )
        model.requires_grad_(False)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        model(*inputs).sample.float().square().mean().backward()
        found = [p.grad.float().flatten() for name, p in model.named_parameters() if "lora_B" in name]
        gradients[quantization] = torch.cat(found)
    error = (gradients[form] - gradients[None]).norm() / gradients[None].norm()
    assert 0 < error < 3 * ERRORS[form]


def test_a_pipeline_takes_a_form_per_component(small_model):
    forms = {"transformer": "int8", "text_encoder": "fp8"}
    pipe = Mask2DiTPipeline.from_pretrained(small_model, torch_dtype=torch.bfloat16, quantization=forms)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["a", "b"], num_inference_steps=1).frames.shape == (1, 18, 64, 96, 3)
    with pytest.raises(ValueError, match="not vae"):
        Mask2DiTPipeline.from_pretrained(small_model, quantization={"vae": "int8"})


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.library == "bitsandbytes"])
def test_bitsandbytes_is_refused_without_a_gpu_with_what_works(form):
    with pytest.raises(ValueError, match=f"{form} needs a CUDA GPU.*int8 or fp8"):
        check_quantization(form, torch.device("cpu"))


@pytest.mark.parametrize("memory", ["fp8", "group_offload", "sequential_offload"])
def test_memory_modes_that_take_weights_apart_are_refused(memory):
    with pytest.raises(ValueError, match=f"memory={memory}.*memory=full or memory=model_offload"):
        check_quantization("int8", torch.device("cuda"), memory)


def test_scenes_of_quantized_weights_are_told_apart_from_others(small_model, tmp_path):
    quantized = load_config(
        InferenceConfig,
        None,
        [f"model={small_model}", "prompts=[a]", f"save_path={tmp_path}", "quantization.transformer=int8"],
    )
    plain = load_config(InferenceConfig, None, [f"model={small_model}", "prompts=[a]", f"save_path={tmp_path}"])
    assert weights_identity(quantized) != weights_identity(plain)
    assert plan_generation(quantized, torch.device("cpu")).config.quantization.components == {"transformer": "int8"}
    with pytest.raises(ValueError, match=r"quantization\.transformer.*'int3'"):
        load_config(InferenceConfig, None, ["prompts=[a]", "quantization.transformer=int3"])
