import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mask2dit.curation import duplicates
from mask2dit.curation.config import DuplicatesConfig, WriteConfig
from mask2dit.curation.duplicates import drop_duplicates, film_families, find_twins, matched_share
from mask2dit.curation.embed import PRINTS, Features, frame_prints
from mask2dit.curation.export import in_validation
from mask2dit.curation.run import curate
from mask2dit.curation.store import kept
from mask2dit.curation.write import Clip
from mask2dit.files import read_lines
from mask2dit.video import open_video, write_video

NAMES = ("a#1", "a#2", "b#1", "c#1")


@pytest.fixture(autouse=True)
def faiss():
    return pytest.importorskip("faiss", reason="pip install mask2dit[curation]")


@pytest.fixture
def pictures():
    """Eight pictures of changing light, (8, 36, 64, 3)."""
    texture = torch.rand(8, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(texture, (36, 64), mode="bilinear").permute(0, 2, 3, 1).byte()


@pytest.fixture
def stored(tmp_path, pictures):
    """Clips with features and prints: b#1 is a smaller copy of a#1, and a#2 repeats a#1 within its film."""
    copy = (pictures[:, ::2, ::2].float() * 0.9).byte()
    shown = dict(zip(NAMES, (pictures, pictures, copy, 255 - pictures.flip(0))))
    vectors = dict(zip(NAMES, np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]))
    tensors = vectors | {name + PRINTS: frame_prints(frames) for name, frames in shown.items()}
    save_file(tensors, tmp_path / "f.safetensors")
    clips = {
        name: Clip(
            id=name,
            source=name[0],
            file=name[0],
            path=name,
            start=0,
            stop=20,
            crop=[0, 0, 36, 64],
            num_frames=20,
            fps=8.0,
            width=frames.shape[2],
            height=frames.shape[1],
        )
        for name, frames in shown.items()
    }
    return [Features(id=name, source=name[0], path="f.safetensors") for name in NAMES], clips, tmp_path


def test_a_copy_in_another_film_is_found_and_one_in_the_same_film_is_none(stored):
    twins = find_twins(*stored, DuplicatesConfig())
    assert set(twins) == {("a#1", "b#1"), ("a#2", "b#1")} and min(twins.values()) > 0.98


def test_unlike_features_are_no_twins(stored):
    features, clips, folder = stored
    tensors = {name + PRINTS: np.eye(192, dtype=np.float16)[:8] for name in NAMES}
    save_file(tensors | dict(zip(NAMES, np.eye(4, dtype=np.float32))), folder / "f.safetensors")
    assert find_twins(features, clips, folder, DuplicatesConfig()) == {}
    assert find_twins(features, clips, folder, DuplicatesConfig(min_cosine=-1)) != {}


def test_the_larger_clip_is_kept_and_named(stored):
    features, clips, _ = stored
    results = drop_duplicates(features, clips, {("a#1", "b#1"): 0.99, ("b#1", "c#1"): 0.98})
    assert [entry.id for entry in kept(results)] == ["a#1", "a#2"]
    of_id = {entry.id: entry for entry in results}
    assert of_id["b#1"].rule == "duplicate" and of_id["b#1"].details == {"twin": "a#1", "cosine": 0.99}
    assert of_id["c#1"].details == {"twin": "a#1", "cosine": None}
    larger = {**clips, "b#1": replace(clips["b#1"], height=80, width=120)}
    assert [entry.id for entry in kept(drop_duplicates(features, larger, {("a#1", "b#1"): 0.99}))] == [
        "a#2",
        "b#1",
        "c#1",
    ]


def test_films_with_twins_are_in_one_part_of_the_data(stored):
    _, clips, _ = stored
    families = film_families(clips, {("a#1", "b#1"): 0.99})
    assert families == {"a": "a", "b": "a"}
    assert in_validation(families["a"], 0.5) == in_validation(families["b"], 0.5)


def test_an_excerpt_shares_its_frames_and_blank_frames_share_nothing(pictures):
    prints = frame_prints(pictures).astype(np.float32)
    assert matched_share(prints[2:5], prints, 0.97)[0] == 1
    assert matched_share(prints, prints[2:5], 0.97)[0] == pytest.approx(3 / 8)
    blank = frame_prints(torch.full((2, 36, 64, 3), 40, dtype=torch.uint8)).astype(np.float32)
    assert not blank.any() and matched_share(blank, prints, 0.97) == (0.0, 0.0)


def test_many_prints_are_searched_in_clusters_with_the_same_result(monkeypatch):
    random = np.random.default_rng(0)
    prints = random.normal(size=(300, 4, 192)).astype(np.float32)
    prints[200:] = prints[:100] + 0.1 * random.normal(size=(100, 4, 192))
    prints /= np.linalg.norm(prints, axis=-1, keepdims=True)
    exact = duplicates._candidates(prints, 0.97)
    assert exact == {(i, i + 200) for i in range(100)}
    monkeypatch.setattr(duplicates, "EXACT_PRINTS", 100)
    monkeypatch.setattr(duplicates, "PRINTS_PER_CLUSTER", 100)
    assert duplicates._candidates(prints, 0.97) == exact


@pytest.mark.slow
def test_a_film_that_was_uploaded_twice_is_used_once(config, films, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    reader = open_video(films / "red_scarf.mp4")
    frames = reader.read(range(reader.num_frames)).numpy()
    write_video(folder / "film.mp4", frames, reader.fps)
    write_video(folder / "again.mp4", frames[:, ::2, ::2], reader.fps)
    stages = ["probe", "split", "write", "score", "filter", "embed", "group"]
    base = config(films=str(folder), write=WriteConfig(encode=False), stages=stages)
    assert curate(base) == 0
    listed = read_lines(Path(base.output, "duplicates.jsonl"))
    assert len(listed) == 4 and all(entry["clip"].startswith("again.mp4#") for entry in listed)
    assert all(entry["twin"] == entry["clip"].replace("again", "film") for entry in listed)
    counts = json.loads(Path(base.output, "funnel.json").read_text())["duplicates"]
    assert counts["dropped"] == {"duplicate": 4} and counts["kept"] == 4
