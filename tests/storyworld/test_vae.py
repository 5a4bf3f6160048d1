import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file

from mask2dit.storyworld import vae as learning_vae
from mask2dit.storyworld.vae import VAEConfig, create_vae, psnr, reconstruct, to_pixels, train_vae, training_scenes

pytestmark = pytest.mark.slow


def make_config(output_dir, **changes) -> VAEConfig:
    """An autoencoder that is trained in seconds."""
    small = {
        "max_steps": 40,
        "batch_size": 2,
        "block_out_channels": [8, 8, 8],
        "latent_channels": 4,
        "norm_num_groups": 4,
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "crop": 16,
        "num_whole_steps": 4,
        "num_evaluated": 2,
        "num_measured": 2,
        "warmup_steps": 4,
        "ema_decay": 0.5,
        "evaluate_every": 10,
        "precision": "fp32",
    }
    return VAEConfig(**{**small, "output_dir": str(output_dir), **changes})


@pytest.fixture
def config(tmp_path):
    return lambda **changes: make_config(tmp_path / "vae", **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    assert train_vae(make_config(folder)) == 0
    return folder


def test_training_improves_held_out_scenes(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]

    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 1
    assert lines[-1]["error"] < lines[0]["error"]


def test_the_folder_holds_a_small_autoencoder_and_pictures(trained):
    vae = AutoencoderKLCogVideoX.from_pretrained(trained / "vae")

    assert vae.config.latent_channels == 4
    assert (trained / "reconstructions_000040.png").is_file()
    weights = load_file(trained / "vae/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_latents_have_unit_variance_once_scaled(trained, config):
    vae = AutoencoderKLCogVideoX.from_pretrained(trained / "vae", torch_dtype=torch.float32)
    scenes = [scene for step in range(100, 108) for scene in training_scenes(config(), step)]
    with torch.no_grad():
        latents = vae.encode(to_pixels(scenes, vae.device)).latent_dist.mode() * vae.config.scaling_factor

    assert latents.std().item() == pytest.approx(1, abs=0.25)


def test_started_again_a_finished_run_writes_the_same(trained):
    file = trained / "vae/diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    assert train_vae(make_config(trained)) == 0

    assert file.read_bytes() == before


def test_a_step_sees_scenes_that_follow_from_seed_and_step(config):
    first, again = training_scenes(config(), 3), training_scenes(config(), 3)

    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], training_scenes(config(), 4)[0])
    assert not np.array_equal(first[0], training_scenes(config(seed=1), 3)[0])


def test_the_last_steps_see_whole_pictures(config, monkeypatch):
    sizes = []
    create = create_vae

    def watched(config):
        vae = create(config)
        encode = vae.encode
        monkeypatch.setattr(vae, "encode", lambda pixels: sizes.append(tuple(pixels.shape[-2:])) or encode(pixels))
        return vae

    monkeypatch.setattr(learning_vae, "create_vae", watched)
    train_vae(config(max_steps=3, num_whole_steps=1, evaluate_every=3, num_evaluated=1, num_measured=1))

    assert sizes[:3] == [(16, 16), (16, 16), (32, 32)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 34, "width": 34}, "height=34 has to be a multiple of 4"),
        ({"crop": 36}, "crop=36 has to fit in height=32 and width=32"),
        ({"num_frames": 11}, r"num_frames=11 has to be 1 \+ 4m, such as 5"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        train_vae(config(**changes))


def test_reconstruction_keeps_shape_and_type(config):
    scenes = training_scenes(config(), 0)
    found = reconstruct(create_vae(config()).eval(), scenes)

    assert found[0].shape == scenes[0].shape and found[0].dtype == np.uint8


def test_psnr_of_a_known_error():
    black, grey = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 51, np.uint8)

    assert psnr([black], [grey]) == pytest.approx(20 * np.log10(255 / 51))
