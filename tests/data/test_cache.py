import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mask2dit import Mask2DiTPipeline
from mask2dit.config import load_config
from mask2dit.data import cache as cache_module
from mask2dit.data import encoding
from mask2dit.data.cache import LatentCache, build_cache, cache_settings, main
from mask2dit.data.clips import read_clip
from mask2dit.data.config import CacheConfig
from mask2dit.data.datasets import build_dataset, collate
from mask2dit.data.encoding import encode_caption, encode_clip, load_encoders, prepare_batch, sample_latents
from mask2dit.data.manifests import read_manifest
from mask2dit.randomness import generator_for
from mask2dit.training.config import TrainConfig
from mask2dit.training.objective import diffusion_loss

ROOT = Path(__file__).parents[2]
FILE_SIZE = 0.036  # MiB: two clips or two captions per file
SIZE = {"num_frames": 9, "height": 32, "width": 48, "num_windows": 2}


@pytest.fixture
def cache_config(pretrain_config, small_model, tmp_path):
    """A cache of eight clips; keywords change the configuration of the data."""

    def make(shard="0/1", model=small_model, dtype="float32", **changes):
        data = pretrain_config(**{**SIZE, "cache": str(tmp_path / "cache"), **changes})
        return CacheConfig(model=str(model), data=data, dtype=dtype, device="cpu", shard=shard, file_size=FILE_SIZE)

    return make


@pytest.fixture(scope="module")
def first_built():
    return []


@pytest.fixture
def built(cache_config, first_built, tmp_path, tmp_path_factory):
    """The configuration of a complete cache, which is computed once."""
    if not first_built:
        first_built.append(tmp_path_factory.mktemp("built") / "cache")
        build_cache(cache_config(cache=str(first_built[0])))
    shutil.copytree(first_built[0], tmp_path / "cache")
    return cache_config()


@pytest.fixture(scope="module")
def encoders(small_model):
    return load_encoders(small_model, torch.float32, torch.device("cpu"))


def dataset(config, tmp_path):
    return build_dataset(config.data, tmp_path / "quarantine.jsonl", config.model, config.dtype)


def on_the_fly(config, tmp_path):
    return build_dataset(replace(config.data, cache=None), tmp_path / "quarantine.jsonl", config.model, config.dtype)


def test_what_is_not_finite_is_not_cached(cache_config, monkeypatch):
    config = cache_config()
    monkeypatch.setattr(
        encoding,
        "encode_clip",
        lambda vae, pixels: (torch.zeros(3, 16, 4, 6), torch.full((3, 16, 4, 6), torch.inf)),
    )
    with pytest.raises(FloatingPointError, match=r"\.mp4.*float32"):
        build_cache(config)
    assert not list(Path(config.data.cache).glob("latents-*"))


def test_the_cache_is_made_with_the_model_that_pre_training_starts_from():
    of_cache = load_config(CacheConfig, ROOT / "configs/data/cache.yaml")
    of_training = load_config(TrainConfig, ROOT / "configs/train/pretrain.yaml")
    assert of_cache.model == of_training.model == TrainConfig().model
    assert CacheConfig(data=of_cache.data).model == TrainConfig().model


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_cache_holds_exactly_what_training_would_encode(cache_config, encoders, tmp_path):
    config = cache_config()
    build_cache(config)
    cached = dataset(config, tmp_path)
    read = on_the_fly(config, tmp_path)
    for position in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        sample, video = cached[position], read[position]
        assert sample["latent_mean"].shape == sample["latent_logvar"].shape == (3, 3, 16, 4, 6)
        assert sample["prompt_embeds"].shape == (3, 64, 64)
        for scene in range(3):
            mean, logvar = encode_clip(encoders.vae, video["pixels"][scene])
            assert torch.equal(sample["latent_mean"][scene], mean)
            assert torch.equal(sample["latent_logvar"][scene], logvar)
            embeddings = encode_caption(encoders, video["captions"][scene])
            assert torch.equal(sample["prompt_embeds"][scene], embeddings)
        for name in ("captions", "names", "epoch", "position", "replaced"):
            assert sample[name] == video[name]
    assert not torch.equal(cached[0, 0]["latent_mean"], cached[1, 0]["latent_mean"])


def test_the_loss_is_the_same_with_and_without_a_cache_and_in_one_process_and_two(
    cache_config, encoders, small_pipeline, small_model, tmp_path
):
    config = cache_config()
    build_cache(config)
    skeleton = Mask2DiTPipeline.skeleton(small_model)

    def losses(pipe, samples):
        latents, prompt_embeds = prepare_batch(pipe, collate(samples), 0, torch.device("cpu"))
        assert latents.shape == (len(samples), 9, 16, 4, 6)
        assert prompt_embeds.shape == (len(samples), 192, 64)
        noise = torch.stack(
            [
                torch.randn(latents.shape[1:], generator=generator_for(0, s["epoch"], s["position"], "noise"))
                for s in samples
            ]
        )
        timesteps = torch.full((len(samples),), 500)
        with torch.no_grad():
            loss = diffusion_loss(
                small_pipeline.transformer,
                skeleton.scheduler,
                latents,
                noise,
                prompt_embeds,
                timesteps,
                reduction="none",
            )
        return latents, loss

    positions = [(0, 0), (0, 1)]
    cached, read = dataset(config, tmp_path), on_the_fly(config, tmp_path)
    latents, loss = losses(skeleton, [cached[p] for p in positions])
    latents_read, loss_read = losses(encoders, [read[p] for p in positions])
    assert torch.equal(latents, latents_read) and torch.equal(loss, loss_read)
    alone = [losses(skeleton, [cached[p]]) for p in positions]
    assert torch.equal(torch.cat([latents for latents, _ in alone]), latents)
    torch.testing.assert_close(torch.cat([loss for _, loss in alone]), loss)


def test_every_position_draws_its_own_latents_from_the_posterior(built, small_model, tmp_path):
    config = built
    sample = dataset(config, tmp_path)[0, 0]
    samples = [sample, {**sample, "position": 1}, {**sample, "epoch": 1}, sample]
    skeleton = Mask2DiTPipeline.skeleton(small_model)
    first, *others, again = prepare_batch(skeleton, collate(samples), 0, torch.device("cpu"))[0]
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_the_cache_can_be_read_without_the_videos(built, tmp_path):
    config = built
    sample = dataset(config, tmp_path)[0, 0]
    config.data.data_root = str(tmp_path / "nowhere")
    assert torch.equal(dataset(config, tmp_path)[0, 0]["latent_mean"], sample["latent_mean"])


def test_the_cache_holds_the_empty_caption(built, encoders):
    config = built
    cache = LatentCache(config.data.cache, cache_settings(config.data, config.model, config.dtype, encoders))
    assert torch.equal(cache.embeddings(""), encode_caption(encoders, ""))


def test_latents_are_kept_in_the_dtype_they_are_computed_in(cache_config, tmp_path):
    config = cache_config(dtype="bfloat16")
    build_cache(config)
    sample = dataset(config, tmp_path)[0, 0]
    assert sample["latent_mean"].dtype == sample["prompt_embeds"].dtype == torch.bfloat16


def test_two_shards_make_the_cache_that_one_makes(cache_config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    build_cache(cache_config(cache=str(one)))
    build_cache(cache_config(cache=str(two), shard="0/2"))
    assert (len(list(two.glob("latents-*"))), len(list(two.glob("text-*")))) == (2, 3)  # of 4 and 5
    build_cache(cache_config(cache=str(two), shard="1/2"))
    assert contents(two) == contents(one)


def test_workers_make_the_cache_that_one_process_makes(cache_config, built, tmp_path, monkeypatch, pickling_engine):
    monkeypatch.setattr(cache_module, "open_engine", pickling_engine)
    build_cache(cache_config(cache=str(tmp_path / "workers")))
    assert contents(tmp_path / "workers") == contents(tmp_path / "cache")


@pytest.mark.parametrize("calls", [0, 5, 9])
def test_an_interrupted_cache_goes_on_and_ends_as_an_uninterrupted_one(cache_config, tmp_path, monkeypatch, calls):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    build_cache(cache_config(cache=str(whole)))
    encoded = []

    def encode(vae, pixels):
        if len(encoded) == calls:
            raise KeyboardInterrupt
        encoded.append(pixels)
        return encode_clip(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_clip", encode)
        with pytest.raises(KeyboardInterrupt):
            build_cache(cache_config(cache=str(resumed)))
    assert len(contents(resumed)) < len(contents(whole))
    (resumed / ".0123456789abcdef.safetensors").write_bytes(b"what a killed process leaves behind")
    encoded.clear()
    monkeypatch.setattr(encoding, "encode_clip", lambda *args: encoded.append(args) or encode_clip(*args))
    build_cache(cache_config(cache=str(resumed)))
    (resumed / ".0123456789abcdef.safetensors").unlink()
    assert contents(resumed) == contents(whole)
    assert len(encoded) == 16 - calls // 4 * 4  # two windows of two clips a file


def test_a_cache_that_is_complete_is_left_as_it_is_without_reading_weights(cache_config, built, monkeypatch):
    monkeypatch.setattr(encoding, "load_encoders", lambda *args: pytest.fail("weights were read"))
    build_cache(cache_config())


def test_a_longer_manifest_adds_to_the_cache(cache_config, write_csv, tmp_path):
    rows = [(f"{k}.mp4", f"clip {k}", 40 + k) for k in range(8)]
    build_cache(cache_config(manifest=str(write_csv(rows[:5], "first.csv"))))
    before = contents(tmp_path / "cache")
    del before["index.npy"]
    with pytest.raises(
        ValueError, match=r"not complete: 3 clips, such as row 6 \(5\.mp4\) and 3 captions are missing"
    ):
        dataset(cache_config(), tmp_path)
    build_cache(cache_config())
    after = contents(tmp_path / "cache")
    assert before.items() <= after.items()
    assert dataset(cache_config(), tmp_path)[0, 0]["latent_mean"].shape[0] == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 48}, r"height \(32 then, 48 now\); make another"),
        ({"num_windows": 3, "seed": 5}, r"num_windows \(2 then, 3 now\), seed \(0 then, 5 now\);"),
        ({"max_stride": 1}, r"max_stride \(2 then, 1 now\)"),
        ({"num_frames": 5}, r"num_frames \(9 then, 5 now\)"),
        ({"dtype": "bfloat16"}, r"dtype \('float32' then, 'bfloat16' now\)"),
    ],
)
def test_a_stale_cache_is_refused_by_training_and_by_the_command(cache_config, built, tmp_path, changes, message):
    changed = cache_config(**changes)
    with pytest.raises(ValueError, match=f"is stale, since it was made with other settings: {message}"):
        dataset(changed, tmp_path)
    with pytest.raises(ValueError, match=message):
        build_cache(changed)


def test_a_cache_of_other_weights_is_refused(cache_config, built, small_model, tmp_path):
    other = tmp_path / "other model"
    shutil.copytree(small_model, other)
    assert dataset(cache_config(model=other), tmp_path)  # the same weights elsewhere are the same
    weights = other / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(ValueError, match=r"other settings: vae weights \('\w+' then, '\w+' now\); make"):
        dataset(cache_config(model=other), tmp_path)


def test_a_cache_whose_videos_have_changed_is_refused(cache_config, clips, tmp_path, numbered_video):
    videos = tmp_path / "videos"
    shutil.copytree(clips, videos)
    build_cache(cache_config(data_root=str(videos)))
    numbered_video(videos / "3.mp4", 50)
    with pytest.raises(ValueError, match=r"stale: 1 video files have changed since, such as .*3\.mp4 \(row 4\)"):
        dataset(cache_config(data_root=str(videos)), tmp_path)


def test_what_cannot_be_read_is_replaced_as_without_a_cache(cache_config, clips, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(clips, videos)
    (videos / "2.mp4").write_bytes(b"no video")
    config = cache_config(data_root=str(videos), max_quarantined_share=0.2)
    build_cache(config)
    (record,) = map(json.loads, (tmp_path / "cache/failed.jsonl").read_text().splitlines())
    assert (record["clip"], record["row"]) == ("2.mp4", "row 3")
    cached, read = dataset(config, tmp_path), on_the_fly(config, tmp_path)
    positions = [(epoch, position) for epoch in range(4) for position in range(2)]
    assert [cached[p]["names"] for p in positions] == [read[p]["names"] for p in positions]
    assert sum(cached[p]["replaced"] for p in positions) > 0
    assert "2.mp4 cannot be read" in cached.quarantine.reasons()["2.mp4"]


def test_a_repaired_clip_is_added_later(cache_config, clips, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(clips, videos)
    (videos / "2.mp4").unlink()
    config = cache_config(data_root=str(videos), max_quarantined_share=0.2)
    build_cache(config)
    shutil.copy(clips / "2.mp4", videos)
    build_cache(config)
    cached = dataset(config, tmp_path)
    assert sum(cached[epoch, position]["replaced"] for epoch in range(4) for position in range(2)) == 0


def test_a_clip_that_is_listed_twice_keeps_both_captions(cache_config, write_csv, tmp_path):
    rows = [("1.mp4", "one", 41), ("1.mp4", "another", 41), ("2.mp4", "2.mp4", 42)]
    config = cache_config(manifest=str(write_csv(rows, "twice.csv")), num_scenes=1)
    build_cache(config)
    samples = [dataset(config, tmp_path)[0, position] for position in range(3)]
    assert sorted(caption for sample in samples for caption in sample["captions"]) == ["2.mp4", "another", "one"]
    assert len({tuple(sample["prompt_embeds"].flatten().tolist()) for sample in samples}) == 3


def test_a_defect_is_not_taken_for_a_broken_clip(cache_config, monkeypatch, tmp_path):
    def encode(vae, pixels):
        raise ValueError("a defect")

    monkeypatch.setattr(encoding, "encode_clip", encode)
    with pytest.raises(ValueError, match="a defect"):
        build_cache(cache_config())
    assert not (tmp_path / "cache/failed.jsonl").exists()


def test_a_full_disk_leaves_the_cache_whole_and_it_goes_on_later(cache_config, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("mask2dit.data.cache_index.save_file", full)
        with pytest.raises(OSError, match=r"cannot write \S+cache/text-\w+\.safetensors .*make room"):
            build_cache(cache_config())
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"index.json", "index.npy"}
    build_cache(cache_config())
    assert list((tmp_path / "cache").glob("latents-*"))


@pytest.mark.parametrize("torn", ['{"clip": "2.mp', ""])
def test_a_line_of_failed_clips_that_was_cut_short_does_not_lock_the_cache(cache_config, tmp_path, torn):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/failed.jsonl").write_text(torn)
    build_cache(cache_config())
    dataset(cache_config(), tmp_path)


def test_a_damaged_file_is_named_by_training_and_made_again_once_it_is_removed(cache_config, built, tmp_path):
    whole = contents(tmp_path / "cache")
    cached = dataset(cache_config(), tmp_path)
    files = list((tmp_path / "cache").glob("latents-*"))
    damages = (
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "a checksum differs"),
        (lambda data: data[:900], "ends too"),
    )
    for damage, reason in damages:
        for file in files:
            file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(
            ValueError, match=rf"latents-\w+\.safetensors is damaged \(\w* ?{reason}.*: remove it and make"
        ):
            for position in range(2):
                cached[0, position]
    for file in files:
        file.unlink()
    build_cache(cache_config())
    assert contents(tmp_path / "cache") == whole


def test_the_index_is_made_again_from_the_files(cache_config, built, tmp_path):
    index = tmp_path / "cache/index.npy"
    whole = index.read_bytes()
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.npy is missing: mask2dit cache makes it again"):
        dataset(cache_config(), tmp_path)
    build_cache(cache_config())
    assert index.read_bytes() == whole
    index.write_bytes(whole[:300])
    with pytest.raises(ValueError, match=r"index\.npy is damaged .*: remove it"):
        dataset(cache_config(), tmp_path)
    index.unlink()
    damaged = next((tmp_path / "cache").glob("text-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged \(it has \d+ bytes instead of \d+\)"):
        build_cache(cache_config())


def test_opening_a_cache_opens_none_of_its_files(cache_config, built, tmp_path):
    for file in (tmp_path / "cache").glob("*.safetensors"):
        file.write_bytes(b"")
    dataset(cache_config(), tmp_path)


def test_a_cache_of_an_earlier_format_is_refused_with_what_to_do(cache_config, built, tmp_path):
    index = tmp_path / "cache/index.json"
    settings = json.loads(index.read_text())
    del settings["format"]
    index.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"made by an earlier version, .*: remove the folder and make it again"):
        build_cache(cache_config())


def test_a_file_of_another_cache_is_refused(cache_config, built, tmp_path):
    build_cache(cache_config(cache=str(tmp_path / "other"), seed=1))
    for other, file in enumerate((tmp_path / "other").glob("latents-*")):
        shutil.copy(file, tmp_path / "cache" / f"latents-{other:016x}.safetensors")
    with pytest.raises(ValueError, match="does not belong to this cache"):
        build_cache(cache_config())


def test_a_file_of_the_cache_that_goes_missing_is_not_taken_for_a_broken_clip(cache_config, built, tmp_path):
    cached = dataset(cache_config(), tmp_path)
    for file in (tmp_path / "cache").glob("latents-*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="latents-"):
        cached[0, 0]
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_missing_cache_is_an_error(cache_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no cache in .*: make it with mask2dit cache"):
        dataset(cache_config(), tmp_path)


def test_the_cache_serves_fine_tuning_too(cache_config, finetune_config, encoders, tmp_path, small_model):
    data = finetune_config(**SIZE, cache=str(tmp_path / "cache"))
    config = CacheConfig(model=str(small_model), data=data, dtype="float32", device="cpu")
    build_cache(config)
    sample = dataset(config, tmp_path)[3, 1]
    clips = {clip.caption: clip for row in read_manifest(data) for clip in row}
    for caption, mean in zip(sample["captions"], sample["latent_mean"]):
        assert torch.equal(encode_clip(encoders.vae, read_clip(data, clips[caption], variant=1))[0], mean)


def test_the_command_reads_a_configuration(pretrain_config, small_model, tmp_path, capsys):
    data = pretrain_config()
    arguments = [
        f"data.{key}={value}" for key, value in {**SIZE, "max_stride": 2, "cache": tmp_path / "cache"}.items()
    ]
    arguments += [f"data.manifest={data.manifest}", f"data.data_root={data.data_root}", f"model={small_model}"]
    assert main([*arguments, "dtype=float32", "device=cpu", f"file_size={FILE_SIZE}"]) == 0
    assert len(list((tmp_path / "cache").glob("latents-*.safetensors"))) == 4
    assert main([*arguments, "device=cpu"]) == 1  # bfloat16
    assert "error: the cache" in capsys.readouterr().err
    assert main([*arguments, "data.height=40"]) == 1
    assert "height=40 has to be a multiple of 16; the nearest is 32 or 48" in capsys.readouterr().err


def test_sampled_latents_have_the_posteriors_mean_and_deviation():
    mean, logvar = torch.full((3, 100, 100), 2.0), torch.full((3, 100, 100), -2.0)
    latents = sample_latents(mean, logvar, generator_for(0, 1, 2, "posterior"), scaling_factor=0.5)
    assert latents.mean().item() == pytest.approx(1.0, abs=0.01)
    assert latents.std().item() == pytest.approx(0.5 * torch.exp(torch.tensor(-1.0)).item(), abs=0.01)
    again = sample_latents(mean, logvar, generator_for(0, 1, 2, "posterior"), scaling_factor=0.5)
    other = sample_latents(mean, logvar, generator_for(0, 1, 3, "posterior"), scaling_factor=0.5)
    assert torch.equal(latents, again) and not torch.equal(latents, other)
