"""The small random model is complete, small, repeatable, and never takes the place of anything else."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from transformers import T5EncoderModel, T5Tokenizer

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.pipelines import untrained
from mask2dit.pipelines.untrained import build_untrained_model

WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_untrained_model(tmp_path_factory.mktemp("untrained") / "model")


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_each_part_loads_with_its_own_class(folder):
    transformer = Mask2DiTTransformer3DModel.from_pretrained(folder)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    scheduler = CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler")

    assert 1e6 <= transformer.num_parameters() <= 3e6
    assert transformer.config.use_rotary_positional_embeddings and transformer.config.patch_size == 2
    assert transformer.config.in_channels == vae.config.latent_channels
    assert transformer.config.text_embed_dim == text_encoder.config.d_model
    assert text_encoder.config.feed_forward_proj == "gated-gelu"
    assert len(tokenizer) <= text_encoder.config.vocab_size
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == "trailing"


def test_parts_fit_together_in_a_pipeline(folder):
    pipeline = Mask2DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    frames = pipeline(
        ["A fox runs.", "It rests."],
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).frames

    assert frames.shape == (1, 18, 64, 96, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.05, "the pictures are flat"
    assert np.abs(np.diff(frames, axis=3)).mean() < 0.2 * frames.std(), "the pictures are hard squares, not soft"


def test_autoencoder_compresses_as_the_real_one(folder):
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    video = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1

    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()

        assert latents.shape == (1, vae.config.latent_channels, 3, 8, 12)
        assert vae.decode(latents).sample.shape == video.shape


def test_base_size_is_9_frames_of_64_by_96(folder):
    config = Mask2DiTTransformer3DModel.load_config(folder, subfolder="transformer")

    assert (config["sample_frames"], config["sample_height"] * 8, config["sample_width"] * 8) == (9, 64, 96)


def test_model_index_names_every_part(folder):
    index = json.loads((folder / "model_index.json").read_text())

    assert index["_class_name"] == "Mask2DiTPipeline"
    parts = {"tokenizer", "text_encoder", "vae", "transformer", "scheduler"}
    assert {name for name in index if not name.startswith("_")} == parts
    assert all((folder / name).is_dir() for name in parts)


def test_folder_is_below_10_megabytes(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 10e6


def test_model_card_says_untrained(folder):
    card = (folder / untrained.MARKER).read_text(encoding="utf-8")

    assert "untrained" in card and "random" in card and "means nothing" in card


def test_nothing_in_the_folder_names_where_it_was_built(folder):
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".json", ".md")]

    assert len(texts) == 6
    assert not any(folder.parent.name in text for text in texts)


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    torch.manual_seed(5)

    assert contents(build_untrained_model(tmp_path / "model")) == contents(folder)


def test_another_seed_gives_other_weights(folder, tmp_path):
    first, second = contents(folder), contents(build_untrained_model(tmp_path / "model", seed=1))

    assert all(first[name] != second[name] for name in WEIGHTS)


def test_random_generators_of_the_caller_are_left_alone(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()

    build_untrained_model(tmp_path / "model")

    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_complete_folder_is_left_as_it_is(folder, monkeypatch):
    def fail(*_):
        raise AssertionError("written again")

    monkeypatch.setattr(untrained, "_write_model", fail)

    assert build_untrained_model(folder, seed=1) == folder


def test_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "model").mkdir()

    assert contents(build_untrained_model(tmp_path / "model")) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_parents_are_created(tmp_path):
    assert (build_untrained_model(str(tmp_path / "some" / "where")) / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["model", "model/notes.txt"])
def test_something_else_in_its_place_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")

    with pytest.raises(FileExistsError, match=str(tmp_path / "model")):
        build_untrained_model(tmp_path / "model")

    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("missing", [*WEIGHTS, "scheduler/scheduler_config.json", "tokenizer/spiece.model"])
def test_part_of_a_model_is_refused(folder, tmp_path, missing):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()

    with pytest.raises(FileExistsError, match="no complete model"):
        build_untrained_model(tmp_path / "model")


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(folder, seed):
        folder.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(untrained, "_write_model", fail)

    with pytest.raises(OSError, match="no space"):
        build_untrained_model(tmp_path / "model")

    assert not any(tmp_path.iterdir())


def test_another_process_may_be_faster(folder, tmp_path, monkeypatch):
    def write_late(written, seed):
        shutil.copytree(folder, written)
        shutil.copytree(folder, tmp_path / "model")

    monkeypatch.setattr(untrained, "_write_model", write_late)

    assert contents(build_untrained_model(tmp_path / "model")) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command_writes_and_prints_the_folder(folder, tmp_path, capsys):
    assert untrained.main([str(tmp_path / "model"), "seed=0"]) == 0

    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(folder)


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert untrained.main([str(tmp_path / "file" / "model")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1
