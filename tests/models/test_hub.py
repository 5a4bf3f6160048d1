"""Models by name, from a hub that runs on this machine."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.inference.config import InferenceConfig, LoRAConfig
from mask2dit.inference.run import load_pipeline, plan_generation, weights_identity
from mask2dit.models.hub import fetch_lora, fetch_model, is_hub_name, local_lora, local_model, origin, recorded
from mask2dit.models.loading import COMPONENT_NAMES

NAME = "someone/small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_pipeline_of_the_hub_equals_that_of_the_folder(hub, small_model):
    pipe = Mask2DiTPipeline.from_pretrained(NAME)
    expected = Mask2DiTPipeline.from_pretrained(small_model)
    for part in COMPONENT_NAMES:
        weights = getattr(pipe, part).state_dict()
        for name, weight in getattr(expected, part).state_dict().items():
            assert torch.equal(weights[name], weight), (part, name)
    assert pipe.encode_prompt([["a fox"]]).equal(expected.encode_prompt([["a fox"]]))


def test_only_the_chosen_weights_of_the_chosen_parts_are_fetched(hub):
    transformer = hub.folder / "transformer"
    shutil.copy(
        transformer / "diffusion_pytorch_model.safetensors", transformer / "diffusion_pytorch_model.ema.safetensors"
    )
    torch.save({}, transformer / "diffusion_pytorch_model.bin")
    (hub.folder / "samples").mkdir()
    (hub.folder / "samples" / "one.mp4").write_bytes(b"0" * 1000)
    Mask2DiTTransformer3DModel.from_pretrained(NAME, subfolder="transformer", variant="ema")
    assert [name for name in hub.fetched if name.startswith(("vae", "text", "samples"))] == []
    assert hub.fetched_weights() == ["transformer/diffusion_pytorch_model.ema.safetensors"]
    Mask2DiTPipeline.from_pretrained(NAME, variant="ema")  # parts without the variant take their plain weights
    assert hub.fetched_weights() == [
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_weights_in_several_files_are_fetched_by_their_index(hub, make_transformer):
    shutil.rmtree(hub.folder)
    make_transformer().save_pretrained(hub.folder, max_shard_size="50KB")  # in the repository's root
    shards = [name for name in hub.files() if hub.is_weights(name)]
    assert len(shards) > 1
    Mask2DiTTransformer3DModel.from_pretrained(NAME)
    assert hub.fetched_weights() == shards


def test_configurations_alone_are_enough_for_what_needs_no_weights(hub):
    folder = fetch_model(NAME, configs_only=True)
    assert not hub.fetched_weights()
    skeleton = Mask2DiTPipeline.skeleton(folder, configs_only=True)
    assert skeleton.fill_size(None, None, None) == (64, 96, 9)


def test_a_folder_of_the_name_wins(hub, small_model):
    assert is_hub_name(NAME)
    shutil.copytree(small_model, NAME)
    assert fetch_model(NAME) == Path(NAME)
    assert not hub.fetched


def test_names_of_folders_do_not_reach_the_hub():
    for name in ("models/nothing", "/some/folder", "./a/b", "../a", "a/b/c", "folder", "a/"):
        assert not is_hub_name(name)


def test_a_record_names_model_and_commit_and_leads_back_to_them(hub):
    config = local_model(InferenceConfig(model=NAME, revision="v1", prompts=["a"]), configs_only=True)
    assert Path(config.model).is_dir()
    assert origin(config.model) == {"model": NAME, "revision": COMMIT}
    record = recorded(config)
    assert (record["model"], record["revision"]) == (NAME, COMMIT)
    again = InferenceConfig(model=record["model"], revision=record["revision"], prompts=["a"])
    assert local_model(again, configs_only=True).model == config.model
    assert recorded(InferenceConfig(model="models/x", prompts=["a"]))["model"] == "models/x"


def test_what_was_fetched_serves_without_a_connection(hub, no_connection, caplog):
    folder = fetch_model(NAME)
    no_connection()
    assert fetch_model(NAME) == folder
    assert "cannot be reached" in caplog.text
    assert fetch_model(NAME, local_files_only=True) == folder
    Mask2DiTPipeline.from_pretrained(NAME, local_files_only=True)


def test_a_model_fetched_without_weights_is_not_complete_without_a_connection(hub, no_connection):
    fetch_model(NAME, configs_only=True)
    no_connection()
    assert fetch_model(NAME, configs_only=True)
    with pytest.raises(ConnectionError, match=r"text_encoder has no weights.*HF_ENDPOINT"):
        fetch_model(NAME)
    with pytest.raises(FileNotFoundError, match=r"offline.*hf download someone/small"):
        fetch_model(NAME, local_files_only=True)


def test_the_cache_may_be_named(hub, tmp_path):
    assert (tmp_path / "mine") in fetch_model(NAME, cache_dir=tmp_path / "mine", configs_only=True).parents
    assert not hub.cache.exists()


@pytest.mark.parametrize(
    "refuses, error, words",
    [
        ((404, "RepoNotFound"), FileNotFoundError, r"neither a folder .* check the spelling"),
        ((401, "RepoNotFound"), FileNotFoundError, "hf auth login"),
        ((401, ""), PermissionError, "refuses the token"),
        ((403, "GatedRepo"), PermissionError, r"accept its licence at http://.*/someone/small"),
        ((403, ""), PermissionError, "refuses the token"),
        ((503, ""), ConnectionError, "503"),
    ],
)
def test_an_error_says_whether_name_licence_token_or_network_is_at_fault(hub, refuses, error, words):
    hub.refuses = refuses
    with pytest.raises(error, match=words):
        fetch_model(NAME)


def test_a_licence_that_was_not_accepted_is_named_where_only_the_files_are_refused(hub):
    hub.gated = True
    with pytest.raises(PermissionError, match="accept its licence"):
        fetch_model(NAME)


def test_a_revision_a_variant_and_a_part_that_are_missing_are_named(hub):
    with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
        fetch_model(NAME, revision="v9")
    with pytest.raises(FileNotFoundError, match="variant 'fp16'"):
        fetch_model(NAME, variant="fp16")
    shutil.rmtree(hub.folder / "vae")
    with pytest.raises(FileNotFoundError, match="has no vae"):
        fetch_model(NAME)
    Mask2DiTTransformer3DModel.from_pretrained(NAME)


def test_without_a_connection_a_model_that_was_never_fetched_is_refused(hub, no_connection):
    no_connection()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        fetch_model(NAME)


@pytest.fixture
def lora_hub(hub, small_model):
    """The hub with a LoRA, saved by PEFT with an alpha, in place of the model."""
    shutil.rmtree(hub.folder)
    transformer = Mask2DiTTransformer3DModel.from_pretrained(small_model)
    get_peft_model(transformer, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])).save_pretrained(hub.folder)
    return hub


def test_a_lora_of_the_hub_is_fetched_with_its_alphas_and_recorded_by_name_and_commit(lora_hub, small_model):
    config = InferenceConfig(model=str(small_model), prompts=["a"], device="cpu", lora=LoRAConfig(path=NAME))
    plan = plan_generation(config, torch.device("cpu"))
    assert sorted(lora_hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    assert weights_identity(plan.config) == weights_identity(
        replace(config, lora=LoRAConfig(path=str(lora_hub.folder / "adapter_model.safetensors")))
    )
    lora = recorded(plan.config)["lora"]
    assert lora == {"path": NAME, "revision": COMMIT, "weight_name": "adapter_model.safetensors", "scale": 1.0}
    assert local_lora(replace(config, lora=LoRAConfig(**lora))).lora.path == plan.config.lora.path
    pipe = load_pipeline(plan.config, torch.device("cpu"))
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.scaling == {"lora": 3.0}
    assert Mask2DiTPipeline.from_pretrained(small_model).load_lora_weights(NAME, revision="v1") is None


def test_of_several_loras_the_named_one_is_fetched_and_serves_without_a_connection(lora_hub, no_connection):
    for name in ("first", "more/second"):
        (lora_hub.folder / f"{name}.safetensors").parent.mkdir(exist_ok=True)
        shutil.copy(lora_hub.folder / "adapter_model.safetensors", lora_hub.folder / f"{name}.safetensors")
    (lora_hub.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"first\.safetensors, more/second\.safetensors: .* weight_name"):
        fetch_lora(NAME)
    with pytest.raises(FileNotFoundError, match=r"expected third\.safetensors \(it holds first"):
        fetch_lora(NAME, "third.safetensors")
    file = fetch_lora(NAME, "more/second.safetensors")
    assert file == fetch_lora(NAME, "second.safetensors", subfolder="more")
    assert "first.safetensors" not in lora_hub.fetched
    no_connection()
    assert file == fetch_lora(NAME, "more/second.safetensors")
    with pytest.raises(ConnectionError, match=r"HF_ENDPOINT"):
        fetch_lora(NAME, "first.safetensors")


@pytest.mark.slow
def test_commands_take_names_and_honour_the_environment(hub, tmp_path):
    manifest = tmp_path / "clips.csv"
    manifest.write_text("fps,width,height,caption,path,num_frame\n8,96,64,a fox,clip.mp4,9\n")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}

    def run(offline: str) -> subprocess.CompletedProcess:
        arguments = ["check", str(manifest), f"model={NAME}", "kind=pretrain", "num_frames=9", "num_scenes=1"]
        return subprocess.run(
            [sys.executable, "-m", "mask2dit", *arguments],
            env={**environment, "HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert "clip.mp4" in run("0").stdout
    again = run("1")
    assert "clip.mp4" in again.stdout, again.stderr
    assert not hub.fetched_weights()
