import json
import shutil

import pytest
import torch
import transformers
from diffusers import TorchAoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from mask2dit import Mask2DiTTransformer3DModel
from mask2dit.models.loading import check_text_encoder, load_scheduler, load_text_encoder, weight_files

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(make_transformer, tmp_path):
    """A folder with `transformer/` as diffusers writes it."""
    make_transformer(mask_variant="v3").save_pretrained(tmp_path / "transformer")
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "transformer" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def assert_same_weights(model, expected):
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_saved_transformer_comes_back_with_its_weights_and_variant(folder, make_transformer):
    model = Mask2DiTTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert_same_weights(model, make_transformer())
    assert model.config.mask_variant == "v3"
    assert not model.training


def test_the_subfolder_may_be_left_out(folder):
    assert Mask2DiTTransformer3DModel.from_pretrained(folder).config.mask_variant == "v3"
    assert Mask2DiTTransformer3DModel.from_pretrained(folder / "transformer").config.mask_variant == "v3"


@pytest.mark.parametrize(
    "config, argument, variant",
    [
        ({"mask_variant": None}, None, "v2"),
        ({"mask_variant": None, "attn_msk_version": 5}, None, "v5"),
        ({"mask_variant": None, "attn_msk_version": 5}, "v1", "v1"),
        ({"mask_variant": "v4", "attn_msk_version": 5}, None, "v4"),
    ],
)
def test_the_variant_is_the_argument_else_the_configs_else_the_released_version_else_v2(
    folder, config, argument, variant
):
    edit_config(folder, **config, add_noise_in_inpaint_model=True)
    model = Mask2DiTTransformer3DModel.from_pretrained(folder, subfolder="transformer", mask_variant=argument)
    assert model.config.mask_variant == variant
    assert model.transformer_blocks[0].attn1.processor.variant == variant


def test_an_unknown_released_variant_is_refused(folder):
    edit_config(folder, mask_variant=None, attn_msk_version=7)
    with pytest.raises(ValueError, match="v7"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_a_plain_cogvideox_config_loads_as_v2(folder, make_transformer):
    edit_config(folder, mask_variant=None, _class_name="CogVideoXTransformer3DModel")
    model = Mask2DiTTransformer3DModel.from_pretrained(folder)
    assert model.config.mask_variant == "v2"
    assert_same_weights(model, make_transformer())


@pytest.mark.parametrize("layout", ["several with an index", "several without", "another name", "bin", "several bin"])
def test_weights_are_read_however_they_are_laid_out(folder, make_transformer, layout):
    path = folder / "transformer"
    weights = load_file(path / WEIGHTS)
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    (path / WEIGHTS).unlink()
    if layout == "several with an index":
        make_transformer(mask_variant="v3").save_pretrained(path, max_shard_size="50KB")
        assert len(weight_files(path)) > 1
    elif layout == "several without":
        for i, half in enumerate(halves):
            save_file(half, path / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    elif layout == "another name":
        save_file(weights, path / "model.safetensors")
    elif layout == "bin":
        torch.save(weights, path / "diffusion_pytorch_model.bin")
    else:
        for i, half in enumerate(halves):
            torch.save(half, path / f"pytorch_model-{i}.bin")
    assert_same_weights(Mask2DiTTransformer3DModel.from_pretrained(folder), make_transformer())


@pytest.mark.parametrize("shard_size", ["10GB", "50KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_of_a_variant_are_read_beside_plain_ones_and_alone(tmp_path, make_transformer, shard_size, safe):
    plain, ema = make_transformer(), make_transformer()
    torch.nn.init.constant_(ema.proj_out.bias, 2.0)
    plain.save_pretrained(tmp_path / "both", max_shard_size=shard_size)
    for name in ("both", "alone"):
        ema.save_pretrained(tmp_path / name, variant="ema", safe_serialization=safe, max_shard_size=shard_size)
    for name, variant, expected in (
        ("both", None, plain),
        ("both", "ema", ema),
        ("alone", "ema", ema),
        ("alone", None, ema),
    ):
        assert_same_weights(Mask2DiTTransformer3DModel.from_pretrained(tmp_path / name, variant=variant), expected)
    with pytest.raises(FileNotFoundError, match=r"'fp16'.*ema"):
        Mask2DiTTransformer3DModel.from_pretrained(tmp_path / "both", variant="fp16")


def test_of_several_variants_without_plain_weights_one_has_to_be_named(tmp_path, make_transformer):
    for variant in ("ema", "fp16"):
        make_transformer().save_pretrained(tmp_path, variant=variant)
    with pytest.raises(ValueError, match="ema, fp16"):
        Mask2DiTTransformer3DModel.from_pretrained(tmp_path)
    assert_same_weights(Mask2DiTTransformer3DModel.from_pretrained(tmp_path, variant="ema"), make_transformer())


def test_safetensors_are_read_where_bin_files_lie_beside_them(tmp_path, make_transformer, small_model):
    stale = make_transformer()
    torch.nn.init.constant_(stale.proj_out.bias, 2.0)
    make_transformer().save_pretrained(tmp_path)
    stale.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="50KB")
    assert_same_weights(Mask2DiTTransformer3DModel.from_pretrained(tmp_path), make_transformer())

    folder = tmp_path / "text_encoder"
    shutil.copytree(small_model / "text_encoder", folder)
    encoder = load_text_encoder(folder, torch.float32)
    torch.save({name: weight + 1 for name, weight in encoder.state_dict().items()}, folder / "pytorch_model.bin")
    assert_same_weights(load_text_encoder(folder, torch.float32), encoder)


@pytest.mark.parametrize("shard_size", ["10GB", "50KB"])
def test_a_quantized_model_that_diffusers_saved_is_checked_and_loaded(
    tmp_path, make_transformer, random_inputs, shard_size
):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    make_transformer().save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    kwargs = {"torch_dtype": torch.bfloat16}
    quantized = Mask2DiTTransformer3DModel.from_pretrained(tmp_path / "plain", quantization_config=config, **kwargs)
    quantized.save_pretrained(tmp_path / "quantized", max_shard_size=shard_size)
    latents, text, timesteps = random_inputs()
    inputs = latents.bfloat16(), text.bfloat16(), timesteps
    with torch.no_grad():
        expected = quantized(*inputs).sample
        read = Mask2DiTTransformer3DModel.from_pretrained(tmp_path / "quantized", **kwargs)
        assert torch.equal(read(*inputs).sample, expected)

    for file in (tmp_path / "quantized").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        weights = load_file(file)
        save_file({name: w for name, w in weights.items() if "blocks.1.attn1.to_q." not in name}, file, metadata)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_q\.weight is missing"):
        Mask2DiTTransformer3DModel.from_pretrained(tmp_path / "quantized", **kwargs)


def test_a_quantized_text_encoder_is_checked_and_loaded(small_model, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    encoder = T5EncoderModel.from_pretrained(
        small_model / "text_encoder", dtype=torch.bfloat16, quantization_config=config
    )
    encoder.save_pretrained(tmp_path)
    tokens = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        read = load_text_encoder(tmp_path, torch.bfloat16)
        assert torch.equal(read(tokens)[0], encoder(tokens)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", {"transformer": torch.bfloat16}])
def test_what_is_not_a_dtype_is_refused_and_does_not_become_float32(folder, dtype):
    with pytest.raises(ValueError, match=r"torch_dtype .*bfloat16"):
        Mask2DiTTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)


def test_a_model_remembers_the_folder_it_came_from(folder):
    model = Mask2DiTTransformer3DModel.from_pretrained(folder)
    assert model.config._name_or_path == str(folder / "transformer")


def test_weights_take_the_dtype_that_is_asked_for(folder):
    model = Mask2DiTTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def rewrite(folder, change):
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_missing_weight_is_named(folder):
    rewrite(folder, lambda weights: weights.pop("transformer_blocks.1.attn1.to_q.weight"))
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_q\.weight is missing"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_an_unknown_weight_is_named(folder):
    rewrite(folder, lambda weights: weights.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"extra\.weight is not one of its weights"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda weights: weights.update({"proj_out.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"proj_out\.bias has the shape \(5,\) instead of \(16,\)"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_corrupt_file_is_named(folder, name, keep):
    path = folder / "transformer" / WEIGHTS
    if name != WEIGHTS:
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
        path = path.with_name(name)
    contents = path.read_bytes()
    path.write_bytes(contents[: keep if isinstance(keep, int) else int(len(contents) * keep)])
    with pytest.raises(ValueError, match=f"{name}.*fetch it again"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_pickled_code_is_never_run(folder, tmp_path):
    path = folder / "transformer"
    (path / WEIGHTS).unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="not a readable weights file"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_says_what_is_expected(folder):
    (folder / "transformer" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected \.safetensors or \.bin"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_a_missing_folder_or_config_is_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mask2DiTTransformer3DModel.from_pretrained(folder / "nowhere")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_a_shard_that_the_index_names_but_that_is_gone_is_named(folder, make_transformer):
    path = folder / "transformer"
    (path / WEIGHTS).unlink()
    make_transformer().save_pretrained(path, max_shard_size="50KB")
    gone = weight_files(path)[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


def test_a_text_encoder_without_all_its_weights_names_them(small_model, tmp_path):
    folder = tmp_path / "text_encoder"
    shutil.copytree(small_model / "text_encoder", folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.final_layer_norm\.weight is missing"):
        load_text_encoder(folder, torch.float32)


def test_a_text_encoder_with_a_weight_of_another_shape_names_it_before_loading(small_model, tmp_path):
    folder = tmp_path / "text_encoder"
    shutil.copytree(small_model / "text_encoder", folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.final_layer_norm\.weight has the shape \(3,\) instead of \(64,\)"):
        check_text_encoder(folder)


def test_a_file_of_diffusers_name_wins_and_a_weight_in_two_files_is_refused(folder, make_transformer):
    path = folder / "transformer"
    weights = load_file(path / WEIGHTS)
    save_file({name: weight + 1 for name, weight in weights.items()}, path / "ema.safetensors")
    assert_same_weights(Mask2DiTTransformer3DModel.from_pretrained(folder), make_transformer())
    (path / WEIGHTS).rename(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors' holds .* again"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


@pytest.mark.parametrize("contents", ["{", "{}", "[]"])
def test_a_corrupt_index_is_named(folder, contents):
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(contents)
    with pytest.raises(ValueError, match=f"{index.name}.*fetch it again"):
        Mask2DiTTransformer3DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "named, loaded",
    [("CogVideoXDPMScheduler",) * 2, ("CogVideoXDDIMScheduler",) * 2, ("SomethingElse", "CogVideoXDDIMScheduler")],
)
def test_the_scheduler_is_the_one_its_config_names_else_ddim(tmp_path, named, loaded):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": named, "snr_shift_scale": 1.0}))
    scheduler = load_scheduler(tmp_path)
    assert type(scheduler).__name__ == loaded
    assert scheduler.config.snr_shift_scale == 1.0
