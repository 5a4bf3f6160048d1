import pytest
import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mask2dit.models.lora import check_lora, load_lora, lora_file

RANK, WIDTH = 2, 32
MODULES = {  # (inputs, outputs) in tiny transformers
    "transformer_blocks.0.attn1.to_q": (WIDTH, WIDTH),
    "transformer_blocks.1.attn1.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.1.ff.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.1.norm1.linear": (8, 6 * WIDTH),
    "proj_out": (WIDTH, 16),
}


def lora(modules=MODULES, rank=RANK):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))
        for name, (inputs, outputs) in modules.items()
    }


def dotted(prefix, down="lora_A.weight", up="lora_B.weight"):
    return lambda name: (f"{prefix}{name}.{down}", f"{prefix}{name}.{up}", f"{prefix}{name}.alpha")


def flat(prefix):
    return lambda name: dotted(prefix, "lora_down.weight", "lora_up.weight")(name.replace(".", "_"))


def old_diffusers(name):
    return dotted("transformer.", "lora.down.weight", "lora.up.weight")(name)


FORMS = {
    "diffusers": dotted("transformer."),
    "diffusers without prefix": dotted(""),
    "older diffusers": old_diffusers,
    "PEFT": dotted("base_model.model."),
    "PEFT with the adapter's name": dotted("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT of a pipeline": dotted("base_model.model.transformer."),
    "ComfyUI": dotted("diffusion_model."),
    "ComfyUI, down and up": dotted("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "ComfyUI checkpoint": dotted("model.diffusion_model."),
    "kohya": flat("lora_unet_"),
    "VideoX-Fun": flat("lora_unet__"),
    "kohya for a transformer": flat("lora_transformer_"),
}


def written(form, weights, alphas=None):
    state = {}
    for name, (down, up) in weights.items():
        down_key, up_key, alpha_key = FORMS[form](name)
        state |= {down_key: down, up_key: up}
        if alphas and name in alphas:
            state[alpha_key] = torch.tensor(float(alphas[name]))
    return state


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_lora_is_read_as_the_same_lora(make_transformer, tmp_path, form):
    path = tmp_path / "lora.safetensors"
    save_file(written(form, lora()), path)
    weights, metadata = load_lora(path, make_transformer())
    expected = {}
    for name, (down, up) in lora().items():
        expected |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    assert weights.keys() == expected.keys() and metadata is None
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    check_lora(path, make_transformer())


@pytest.mark.parametrize("form", FORMS)
def test_every_module_is_scaled_by_its_own_alpha_over_its_rank(make_transformer, form):
    first, second, *_ = MODULES
    weights, _ = load_lora(written(form, lora(), {first: 1, second: 8}), make_transformer())
    for name, scale in ((first, 1 / RANK), (second, 8 / RANK), ("proj_out", 1.0)):
        assert torch.equal(weights[f"transformer.{name}.lora_B.weight"], lora()[name][1] * scale)
    assert not any(key.endswith("alpha") for key in weights)


def test_the_alphas_of_pefts_config_beside_its_file_are_kept(make_transformer, tmp_path):
    save_file(written("PEFT", lora()), tmp_path / "adapter_model.safetensors")
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["to_q"], alpha_pattern={"proj_out": 4}, use_rslora=True)
    config.save_pretrained(tmp_path)
    _, metadata = load_lora(tmp_path, make_transformer())
    assert metadata["transformer.lora_alpha"] == 16 and metadata["transformer.use_rslora"]
    assert metadata["transformer.alpha_pattern"] == {"proj_out": 4}


def test_the_config_inside_diffusers_own_file_is_kept(make_transformer, tmp_path):
    layers = {key.removeprefix("transformer."): weight for key, weight in written("diffusers", lora()).items()}
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(MODULES)).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    CogVideoXLoraLoaderMixin.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    assert load_lora(tmp_path, make_transformer())[1]["transformer.lora_alpha"] == 16


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_a_deeper_or_wider_model_names_what_differs(make_transformer, tmp_path, form):
    deeper = {f"transformer_blocks.{i}.attn1.to_q": (WIDTH, WIDTH) for i in range(5)}
    wider = {"transformer_blocks.0.attn1.to_out.0": (3072, 3072)}
    for modules, message in ((deeper, "for 5 layers.* has 2 layers"), (wider, r"3072 \(CogVideoX-5B\).* width 32")):
        path = tmp_path / "lora.safetensors"
        save_file(written(form, lora(modules)), path)
        for read in (check_lora, load_lora):
            with pytest.raises(ValueError, match=rf"lora\.safetensors.*{message}"):
                read(path, make_transformer())


@pytest.mark.parametrize(
    "key, message",
    [
        ("unet.down.lora_A.weight", r"unet\.down, not for this transformer"),
        ("transformer_blocks.0.attn1.norm_q.lora_A.weight", "norm_q, not for this transformer"),
        ("lora_te1_encoder_layer_0.lora_down.weight", "lora_te1_encoder_layer_0, not for this transformer"),
        ("transformer.proj_out.lora_A.weight", "only one half of the weights for proj_out"),
        ("transformer.proj_out.dora_scale", r"cannot be converted .*proj_out\.dora_scale"),
        ("diffusion_model.proj_out.lokr_w1", r"cannot be converted .*proj_out\.lokr_w1"),
        ("layers.0.attention.query_key_value.matrix_A.0", r"cannot be converted .*matrix_A\.0"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_an_example(make_transformer, tmp_path, key, message):
    path = tmp_path / "lora.safetensors"
    save_file(
        {**written("diffusers", lora({"transformer_blocks.0.attn1.to_q": (32, 32)})), key: torch.zeros(2, 32)}, path
    )
    for read in (check_lora, load_lora):
        with pytest.raises(ValueError, match=rf"lora\.safetensors.*{message}"):
            read(path, make_transformer())
    with pytest.raises(ValueError, match=message):
        load_lora(load_file(path), make_transformer())


def test_weights_of_another_shape_are_named_with_both(make_transformer):
    weights = written("diffusers", lora({"proj_out": (WIDTH, 64)}))
    with pytest.raises(
        ValueError, match=r"\(2, 32\) and \(64, 2\) for proj_out, which needs \(rank, 32\) and \(16, rank\)"
    ):
        load_lora(weights, make_transformer())


def test_one_weight_in_two_forms_is_refused(make_transformer):
    weights = written("diffusers", lora()) | written("kohya", lora())
    with pytest.raises(ValueError, match=r"'transformer\..* again as 'lora_unet_"):
        load_lora(weights, make_transformer())


def test_an_empty_lora_is_refused(make_transformer):
    with pytest.raises(ValueError, match="no weights"):
        load_lora({}, make_transformer())


def test_the_file_that_is_checked_is_the_one_that_is_loaded(make_transformer, tmp_path):
    save_file(written("diffusers", lora()), tmp_path / "b.safetensors")
    assert lora_file(tmp_path).name == "b.safetensors"
    save_file(written("kohya", lora({"proj_out": (WIDTH, 16)})), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        check_lora(tmp_path, make_transformer())
    assert len(load_lora(tmp_path, make_transformer(), weight_name="a.safetensors")[0]) == 2
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        load_lora(tmp_path, make_transformer(), weight_name="c.safetensors")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    assert len(load_lora(tmp_path, make_transformer())[0]) == 2 * len(MODULES)


def test_a_second_lora_fits_beside_a_first(make_transformer):
    transformer = make_transformer()
    transformer.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "proj_out"]))
    assert len(load_lora(written("kohya", lora()), transformer)[0]) == 2 * len(MODULES)
