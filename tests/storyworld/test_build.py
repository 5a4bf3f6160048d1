import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.config import load_config
from mask2dit.data.config import CacheConfig
from mask2dit.hashing import fingerprint
from mask2dit.models.loading import load_tokenizer
from mask2dit.storyworld.build import BuildConfig, build_model
from mask2dit.storyworld.prompts import MARKER
from mask2dit.storyworld.text import TextConfig, create_text_encoder, learn_pieces
from mask2dit.storyworld.vae import VAEConfig, create_vae
from mask2dit.storyworld.world import caption, sample_story
from mask2dit.training.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs/storyworld"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the autoencoder's and the text encoder's training leave, but with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    vae = VAEConfig(block_out_channels=[8, 8, 8], latent_channels=4, norm_num_groups=4)
    create_vae(vae).half().save_pretrained(folder / "vae/vae")
    (folder / "text/tokenizer").mkdir(parents=True)
    captions = [caption(sample_story(seed), 0) for seed in range(300)]
    (folder / "text/tokenizer/spiece.model").write_bytes(learn_pieces(captions))
    text = TextConfig(width=32, num_heads=2, num_layers=1, feed_forward_width=32)
    size = len(load_tokenizer(folder / "text/tokenizer"))
    create_text_encoder(text, size).half().save_pretrained(folder / "text/text_encoder")
    return folder


@pytest.fixture
def config(parts, tmp_path):
    def make(**changes):
        small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 32, "time_embed_dim": 16}
        where = {"vae": str(parts / "vae"), "text": str(parts / "text"), "output": str(tmp_path / "model")}
        return BuildConfig(**{**small, **where, **changes})

    return make


def test_the_folder_opens_and_samples_a_story(config):
    build_model(config())
    pipe = Mask2DiTPipeline.from_pretrained(config().output)
    pipe.set_progress_bar_config(disable=True)
    story = sample_story(0)
    prompts = [caption(story, k) for k in range(2)]
    frames = pipe(prompts, height=64, width=64, num_frames=9, num_inference_steps=2).frames

    assert frames.shape == (1, 18, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_the_folder_says_what_it_was_trained_with_and_keeps_its_card(config):
    build_model(config())
    marker = json.loads((Path(config().output) / MARKER).read_text())
    assert marker == {"num_scenes": 3, "num_frames": 9, "height": 64, "width": 64}
    (Path(config().output) / "README.md").write_text("the card")
    build_model(config(seed=1))
    assert (Path(config().output) / "README.md").read_text() == "the card"


def test_the_transformer_fits_the_autoencoder_and_the_text_window(config):
    build_model(config())
    transformer = Mask2DiTTransformer3DModel.from_pretrained(config().output, subfolder="transformer")

    assert transformer.config.in_channels == 4
    assert (transformer.config.sample_height, transformer.config.sample_width) == (16, 16)
    assert transformer.config.max_text_seq_length == config().text_window
    assert transformer.config.mask_variant == "v2" and transformer.config.use_rotary_positional_embeddings
    assert {weight.dtype for weight in load_file(Path(config().output) / WEIGHTS).values()} == {torch.float32}


def test_a_trained_transformer_is_taken_in_half_precision_and_the_other_parts_as_they_were(config, tmp_path):
    start, final = config(), config(trained=str(tmp_path / "model"), output=str(tmp_path / "final"))
    build_model(start)
    build_model(final)
    before, after = (load_file(Path(folder.output) / WEIGHTS) for folder in (start, final))

    assert all(torch.equal(after[name], before[name].half()) for name in before)
    for part in ("vae", "text_encoder", "tokenizer"):  # or cached latents would be stale
        assert fingerprint(Path(start.output) / part) == fingerprint(Path(final.output) / part)


def test_the_tokenizer_is_its_sentencepiece_model_alone(config):
    build_model(config())

    assert [file.name for file in (Path(config().output) / "tokenizer").iterdir()] == ["spiece.model"]


def test_nothing_in_the_folder_names_where_it_was_built(config, tmp_path):
    build_model(config())
    texts = [file.read_text() for file in Path(config().output).rglob("*.json")]

    assert len(texts) == 6
    assert not any(str(tmp_path.parent.name) in text or "parts" in text for text in texts)


def test_a_folder_that_is_there_is_replaced(config):
    weights = []
    for seed in (0, 1):
        build_model(config(seed=seed))
        weights.append(load_file(Path(config().output) / WEIGHTS))

    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_missing_part_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build_model(config(vae=str(tmp_path / "nothing")))


def test_a_size_that_the_model_cannot_carry_is_refused(config):
    with pytest.raises(ValueError, match="height=72 has to be a multiple of 32"):
        build_model(config(height=72))


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_configurations_of_model_cache_and_training_agree(name):
    """Sizes, and all that a cache depends on; else a run would stop at its first step, hours after the start."""
    model = load_config(BuildConfig, CONFIGS / "model.yaml")
    train = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    changes = ["data.kind=pretrain", "data.manifest=datasets/storyworld/pretrain.csv"]
    changes += ["data.cache=outputs/storyworld/cache/pretrain"]
    cache = load_config(CacheConfig, CONFIGS / "cache.yaml", changes if name == "pretrain" else [])
    vae, text = load_config(VAEConfig, CONFIGS / "vae.yaml"), load_config(TextConfig, CONFIGS / "text.yaml")

    assert cache.data == train.data
    assert {"bf16": "bfloat16", "fp32": "float32"}[train.precision] == cache.dtype
    for size in ("num_frames", "height", "width"):
        assert getattr(model, size) == getattr(vae, size) == getattr(train.data, size)
    assert model.text_window == text.window
    assert (model.vae, model.text) == (vae.output_dir, text.output_dir)
    assert model.output == cache.model
