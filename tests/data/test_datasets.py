import json
import logging
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from mask2dit.data.clips import Clip
from mask2dit.data.datasets import MAX_REPLACEMENTS, FineTuneDataset, PretrainDataset, build_dataset, collate
from mask2dit.data.order import PositionSampler
from mask2dit.data.quarantine import Quarantine, QuarantineError


def load(dataset, num_workers=0, start=0, stop=8, rank=0, world_size=1):
    """The samples of one rank."""
    sampler = PositionSampler(len(dataset), start, stop, rank, world_size)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=num_workers, collate_fn=collate)
    return [batch for batch in loader]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert torch.equal(batch["pixels"], other["pixels"])
        assert {k: v for k, v in batch.items() if k != "pixels"} == {k: v for k, v in other.items() if k != "pixels"}


@pytest.fixture
def pretrain(pretrain_config, tmp_path):
    return lambda **changes: PretrainDataset(pretrain_config(**changes), tmp_path / "quarantine.jsonl")


@pytest.fixture
def finetune(finetune_config, tmp_path):
    return lambda **changes: FineTuneDataset(finetune_config(**changes), tmp_path / "quarantine.jsonl")


def test_a_sample_holds_scenes_captions_and_where_they_come_from(pretrain, clips):
    sample = pretrain()[3, 1]
    assert sample["pixels"].shape == (3, 5, 3, 16, 24)
    assert sample["pixels"].dtype == torch.float32
    assert sample["pixels"].abs().max() <= 1
    assert (sample["epoch"], sample["position"], sample["replaced"]) == (3, 1, 0)
    numbers = [int(caption.split()[1]) for caption in sample["captions"]]
    assert sample["names"] == [f"row {k + 1} ({clips / f'{k}.mp4'})" for k in numbers]


def test_a_batch_stacks_tensors_and_lists_the_rest(pretrain):
    dataset = pretrain()
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch["pixels"].shape == (2, 3, 5, 3, 16, 24)
    assert [len(captions) for captions in batch["captions"]] == [3, 3]
    assert batch["position"] == [0, 1]


def test_pre_training_takes_every_clip_at_most_once_an_epoch(pretrain):
    dataset = pretrain()
    assert len(dataset) == 2
    for epoch in range(3):
        captions = [caption for position in range(2) for caption in dataset[epoch, position]["captions"]]
        assert len(set(captions)) == 6


def test_every_epoch_has_other_samples_and_other_windows_of_frames(pretrain, finetune):
    for dataset in (pretrain(), finetune()):
        epochs = [[dataset[epoch, p]["captions"] for p in range(len(dataset))] for epoch in range(4)]
        assert len({json.dumps(epoch) for epoch in epochs}) == 4
    dataset = finetune(num_scenes=3)
    frames = {  # of the row of which only one window can be taken
        tuple(sample["pixels"].flatten(1).mean(1).tolist())
        for sample in (dataset[epoch, p] for epoch in range(6) for p in range(3))
        if sample["captions"] == ["scene 4", "scene 5", "scene 6"]
    }
    assert len(frames) == 6


def test_the_windows_of_frames_repeat_after_their_number(finetune):
    dataset = finetune(num_windows=2)
    frames = [
        next(
            sample["pixels"]
            for sample in (dataset[epoch, p] for p in range(3))
            if sample["captions"] == ["scene 4", "scene 5", "scene 6"]
        )
        for epoch in range(4)
    ]
    assert torch.equal(frames[0], frames[2]) and torch.equal(frames[1], frames[3])
    assert not torch.equal(frames[0], frames[1])


def test_fine_tuning_takes_consecutive_scenes_from_anywhere_in_a_row(finetune):
    dataset = finetune()
    assert len(dataset) == 3
    rows = [[0, 1, 2, 3], [4, 5, 6], [7, 6, 5, 4, 3, 2]]
    windows = {tuple(row[start : start + 3]) for row in rows for start in range(len(row) - 2)}
    found = set()
    for epoch in range(30):
        for position in range(3):
            found.add(tuple(int(caption.split()[1]) for caption in dataset[epoch, position]["captions"]))
    assert found == windows


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_samples_do_not_depend_on_the_number_of_workers(kind, request):
    dataset = request.getfixturevalue(kind)()
    batches = load(dataset)
    assert_same(load(dataset, num_workers=1), batches)
    assert_same(load(dataset, num_workers=2), batches)


def test_two_ranks_take_together_what_one_takes(finetune):
    one = [{k: v[i] for k, v in batch.items()} for batch in load(finetune()) for i in range(2)]
    first, second = (
        [{k: v[i] for k, v in batch.items()} for batch in load(finetune(), rank=rank, world_size=2) for i in range(2)]
        for rank in range(2)
    )
    both = [sample for pair in zip(first, second) for sample in pair]
    assert_same(both, one)


def test_a_run_that_goes_on_reads_what_it_would_have_read(pretrain):
    assert_same(load(pretrain(), start=4, num_workers=1), load(pretrain())[2:])


def test_a_dataset_can_be_sent_to_a_worker_that_is_spawned(pretrain):
    dataset = pretrain()
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 0]["pixels"], dataset[1, 0]["pixels"])


def test_too_short_clips_are_left_out_and_counted(pretrain, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = pretrain(num_frames=20)  # which takes 45 frames
    assert {caption for epoch in range(9) for caption in dataset[epoch, 0]["captions"]} == {
        "clip 5",
        "clip 6",
        "clip 7",
    }
    assert "5 of 8 clips are left out, since by the manifest's account they are too short" in caplog.text


def test_windows_with_a_too_short_scene_are_left_out(finetune, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = finetune(num_frames=43)  # scenes 0, 1 and 2 have fewer
    captions = {tuple(dataset[epoch, p]["captions"]) for epoch in range(20) for p in range(len(dataset))}
    assert len(dataset) == 2
    assert not any(f"scene {k}" in window for k in range(3) for window in captions)
    assert "1 of 3 rows are left out" in caplog.text


def test_a_file_listed_twice_is_never_twice_in_a_sample(pretrain, clips, write_csv, tmp_path):
    (tmp_path / "clips").symlink_to(clips)
    names = [
        "0.mp4",
        "./0.mp4",
        "../" + clips.name + "/0.mp4",
        str(tmp_path / "clips/0.mp4"),
        "1.mp4",
        "2.mp4",
        "3.mp4",
    ]
    manifest = write_csv([(name, f"clip {k}", 40) for k, name in enumerate(names)], "twice.csv")
    dataset = pretrain(manifest=str(manifest), data_root=str(clips))
    assert len(dataset) == 2
    seen = set()
    for epoch in range(8):
        for position in range(2):
            captions = dataset[epoch, position]["captions"]
            assert len({max(3, int(caption.split()[1])) for caption in captions}) == 3
            assert captions == dataset[epoch, position]["captions"]
            seen.update(captions)
    assert len(seen) == 7
    with pytest.raises(ValueError, match=r"has 2 clips of at least 12 frames, but .* num_scenes=3 different"):
        pretrain(manifest=str(write_csv([(name, "a", 40) for name in names[:5]], "few.csv")), data_root=str(clips))


def test_too_few_clips_are_an_error(pretrain, finetune):
    with pytest.raises(
        ValueError, match=r"clips\.csv has 1 clips of at least 47 frames, but .* num_scenes=3 different"
    ):
        pretrain(num_frames=21)
    with pytest.raises(ValueError, match="no row with num_scenes=7 consecutive scenes of at least 5 frames"):
        finetune(num_scenes=7)


def test_a_position_outside_the_epoch_is_an_error(pretrain):
    with pytest.raises(IndexError, match="an epoch has samples 0 to 1, but sample 2 was asked for"):
        pretrain()[0, 2]


@pytest.fixture
def with_broken(clips, pretrain_config, finetune_config, tmp_path):
    """A dataset of which clips 2 and 7 are broken in different ways."""

    def make(kind, **changes):
        config = {"pretrain": pretrain_config, "finetune": finetune_config}[kind](**changes)
        folder = tmp_path / "some broken"
        if not folder.exists():
            folder.mkdir()
            for k in range(8):
                source = clips / f"{k}.mp4"
                (folder / f"{k}.mp4").write_bytes(b"no video" if k == 2 else source.read_bytes())
            (folder / "7.mp4").unlink()
        config.data_root = str(folder)
        return build_dataset(config, tmp_path / "run/quarantine.jsonl", "no model is needed", "float32")

    return make


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_what_cannot_be_read_is_replaced_alike_by_any_number_of_workers(with_broken, kind):
    dataset = with_broken(kind, max_quarantined_share=0.25)
    batches = load(dataset)
    assert_same(load(dataset, num_workers=2), batches)
    replaced = [count for batch in batches for count in batch["replaced"]]
    assert sum(replaced) > 0
    names = [name for batch in batches for names in batch["names"] for name in names]
    assert not any("2.mp4" in name or "7.mp4" in name for name in names)
    assert all(len(set(captions)) == 3 for batch in batches for captions in batch["captions"])


def test_what_cannot_be_read_is_listed_with_the_reason(with_broken, tmp_path):
    dataset = with_broken("pretrain", max_quarantined_share=0.25)
    load(dataset, num_workers=2, stop=12)
    records = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert {(record["clip"], record["row"]) for record in records} == {("2.mp4", "row 3"), ("7.mp4", "row 8")}
    assert all("epoch" in record and "position" in record for record in records)
    reasons = dataset.quarantine.reasons()
    assert "2.mp4 cannot be read" in reasons["2.mp4"]
    assert "7.mp4 does not exist" in reasons["7.mp4"]


def test_a_line_of_the_quarantine_that_was_cut_short_does_not_lock_the_run(with_broken, tmp_path):
    path = tmp_path / "run/quarantine.jsonl"
    path.parent.mkdir()
    path.write_text('{"clip": "5.mp4", "ro')
    dataset = with_broken("pretrain", max_quarantined_share=0.25)
    load(dataset, stop=12)
    assert dataset.quarantine.reasons().keys() == {"2.mp4", "7.mp4"}
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"quarantine\.jsonl, line 1 is damaged"):
        dataset.quarantine.reasons()


def test_more_than_the_share_ends_the_run(with_broken):
    dataset = with_broken("pretrain", max_quarantined_share=0.2)  # one of eight is borne, two are not
    with pytest.raises(QuarantineError, match=r"2 of 8 clips could not be read, more than max_quarantined_share=0\.2"):
        load(dataset, stop=12)


def test_the_share_counts_what_other_processes_listed(tmp_path):
    one, another = (Quarantine(tmp_path / "q.jsonl", num_clips=8, max_share=0.2) for _ in range(2))
    first, second = (Clip(root=tmp_path, file=name, caption="a", row=1) for name in ("1.mp4", "2.mp4"))
    one.add(first, OSError("gone"), epoch=0, position=0)
    another.add(first, OSError("gone"), epoch=1, position=0)  # the same clip again counts once
    with pytest.raises(QuarantineError, match="2 of 8 clips could not be read"):
        another.add(second, OSError("gone"), epoch=1, position=1)


def test_a_sample_without_replacement_is_an_error(with_broken):
    dataset = with_broken("pretrain", num_scenes=8, max_quarantined_share=1.0)
    with pytest.raises(ValueError, match="sample 0 of epoch 0 and 0 replacements of it could not be read"):
        dataset[0, 0]


def test_replacements_are_bounded(pretrain_config, tmp_path, write_csv):
    manifest = write_csv([(f"nowhere/{k}.mp4", "a", 40) for k in range(50)], "broken.csv")
    config = pretrain_config(manifest=str(manifest), max_quarantined_share=1.0)
    with pytest.raises(ValueError, match=f"and {MAX_REPLACEMENTS} replacements of it could not be read"):
        PretrainDataset(config, tmp_path / "quarantine.jsonl")[0, 0]


def test_a_defect_is_not_taken_for_a_broken_clip(pretrain, monkeypatch, tmp_path):
    def broken(*args):
        raise TypeError("a defect")

    monkeypatch.setattr("mask2dit.data.datasets.read_clip", broken)
    with pytest.raises(TypeError, match="a defect"):
        pretrain()[0, 0]
    assert not (tmp_path / "quarantine.jsonl").exists()
