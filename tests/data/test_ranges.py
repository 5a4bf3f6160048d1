"""Clips that are frame ranges of a film give what the same clips in files of their own give."""

import csv
import json
import subprocess
from dataclasses import replace

import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from mask2dit.data.cache import build_cache
from mask2dit.data.check import check_manifest
from mask2dit.data.clips import Clip, UnreadableClipError, open_clip, read_clip
from mask2dit.data.config import CacheConfig, DataConfig
from mask2dit.data.datasets import build_dataset, collate
from mask2dit.data.encoding import load_encoders, prepare_batch
from mask2dit.data.manifests import read_manifest
from mask2dit.training.objective import diffusion_loss
from mask2dit.video import open_video, write_video
from mask2dit.video import reading as reading_module

RANGES = ((0, 30), (30, 64), (64, 100))
TINY = {"num_frames": 9, "height": 32, "width": 48, "max_retries": 0, "num_windows": 2}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two folders with the same manifests: `ranges` has a film, `files` has its scenes, encoded without loss.

    The files have the names of the ranges, since the choice of frames depends on them.
    """
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "ranges").mkdir()
    (folder / "files").mkdir()
    film = folder / "ranges/film.mp4"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (100, 8, 12, 3), generator=generator)
    frames = noise.repeat_interleave(8, 1).repeat_interleave(8, 2)
    write_video(film, frames.to(torch.uint8).numpy(), 12)
    decoded = open_video(film).read(range(100)).numpy()
    for start, end in RANGES:
        command = f"-f rawvideo -pix_fmt rgb24 -s 96x64 -r 12 -i - -c:v ffv1 -pix_fmt bgr0 -f matroska film.mp4#{start}-{end}"
        subprocess.run(
            [get_ffmpeg_exe(), "-v", "error", *command.split()],
            input=decoded[start:end].tobytes(),
            cwd=folder / "files",
            check=True,
        )
    listed = {
        "ranges": [{"url": "film.mp4", "start": start, "end": end} for start, end in RANGES],
        "files": [{"url": f"film.mp4#{start}-{end}"} for start, end in RANGES],
    }
    for name, scenes in listed.items():
        scenes = [{**scene, "caption": f"scene {i}", "fps": 12} for i, scene in enumerate(scenes)]
        (folder / name / "sft.json").write_text(json.dumps([{"prefix": "film", "values": scenes}]))
    with (folder / "ranges/pretrain.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["caption", "path", "start", "end"])
        rows.writerows([f"scene {i}", "film.mp4", start, end] for i, (start, end) in enumerate(RANGES))
    return folder


def config(folder, name, **changes):
    return DataConfig(kind="finetune", manifest=str(folder / name / "sft.json"), **{**TINY, **changes})


@pytest.fixture
def loss(small_pipeline, small_model, tmp_path):
    """The loss of the first samples of a configuration."""
    encoders = load_encoders(small_model, torch.float32, torch.device("cpu"))

    def compute(data):
        dataset = build_dataset(data, tmp_path / "quarantine.jsonl", small_model, "float32")
        batch = collate([dataset[epoch, 0] for epoch in range(2)])
        latents, prompt_embeds = prepare_batch(encoders, batch, 0, torch.device("cpu"))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        timesteps = torch.tensor([500, 100])
        with torch.no_grad():
            return diffusion_loss(
                small_pipeline.transformer,
                encoders.scheduler,
                latents,
                noise,
                prompt_embeds,
                timesteps,
                reduction="none",
            )

    return compute


def test_the_loss_of_ranges_equals_that_of_clips_written_without_loss(films, loss, small_model, tmp_path):
    expected = loss(config(films, "files"))
    assert torch.equal(loss(config(films, "ranges")), expected)
    cached = config(films, "ranges", cache=str(tmp_path / "cache"))
    build_cache(CacheConfig(model=str(small_model), data=cached, dtype="float32", device="cpu"))
    assert torch.equal(loss(cached), expected)


def test_ranges_of_one_film_are_different_clips_in_cache_and_pre_training(films, small_model, tmp_path):
    data = DataConfig(manifest=str(films / "ranges/pretrain.csv"), max_stride=1, **TINY)
    dataset = build_dataset(data, tmp_path / "quarantine.jsonl", small_model, "float32")
    assert sorted(dataset[0, 0]["captions"]) == ["scene 0", "scene 1", "scene 2"]
    assert len({clip.name for row in read_manifest(data) for clip in row}) == 3


def test_the_check_decodes_ranges_and_names_those_that_the_film_does_not_hold(films, tmp_path):
    good = check_manifest(config(films, "ranges"))
    assert (good.num_clips, good.problems) == (3, [])
    with (films / "ranges/sft.json").open() as file:
        rows = json.load(file)
    rows[0]["values"][2]["end"] = 101
    rows[0]["values"].append(rows[0]["values"][0])
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    data = DataConfig(kind="finetune", manifest=str(tmp_path / "sft.json"), data_root=str(films / "ranges"), **TINY)
    outside, twice = check_manifest(data).problems
    assert (
        outside.scene == 3 and "frames 64 to 100 were asked for, but the video has frames 0 to 99" in outside.message
    )
    assert twice.scene == 4 and twice.is_warning and "listed twice" in twice.message


def test_a_range_and_a_part_of_the_picture_are_read(films):
    clip = Clip(root=films / "ranges", file="film.mp4", caption="a", row=1, start=30, end=64, crop=(8, 16, 40, 60))
    reader = open_clip(clip)
    assert (reader.num_frames, reader.height, reader.width, reader.fps) == (34, 40, 60, 12)
    whole = open_video(clip.path).read([35, 30])
    assert torch.equal(reader.read([5, 0]), whole[:, 8:48, 16:76])
    with pytest.raises(IndexError):
        reader.read([34])
    outside = replace(clip, crop=(8, 16, 64, 60))
    with pytest.raises(UnreadableClipError, match=r"film.mp4: rows 8 to 71 .* but the picture has 64 rows"):
        read_clip(config(films, "ranges"), outside, 0)


def test_a_film_is_indexed_once_for_all_its_ranges_until_it_changes(films, tmp_path, monkeypatch):
    indexed = []
    real = reading_module.index_packets
    monkeypatch.setattr(reading_module, "index_packets", lambda *a: indexed.append(1) or real(*a))
    film = tmp_path / "film.mp4"
    film.write_bytes((films / "ranges/film.mp4").read_bytes())
    first, again = open_video(film).read([40]), open_video(film).read([40])
    assert torch.equal(first, again) and len(indexed) == 1
    write_video(film, open_video(film).read(range(20)).numpy(), 12)
    assert open_video(film).num_frames == 20 and len(indexed) == 2
