from itertools import pairwise

import pytest
import torch

from mask2dit.data import clips as clips_module
from mask2dit.data.clips import Clip, UnreadableClipError, choose_window, read_clip, required_frames, window_variant
from mask2dit.data.config import DataConfig


def windows(config, total_frames, count=200):
    return [choose_window(config, "clip.mp4", total_frames, variant) for variant in range(count)]


def test_pre_training_needs_164_frames_for_49_at_stride_3():
    config = DataConfig()
    assert required_frames(config) == 164
    assert len(choose_window(config, "clip.mp4", 164, 0)) == 49
    with pytest.raises(ValueError, match="it has 163 frames, but 164 are needed for 49 at stride 3"):
        choose_window(config, "clip.mp4", 163, 0)


def test_pre_training_takes_its_stride_from_between_the_first_and_last_five_percent():
    chosen = windows(DataConfig(num_frames=9, max_stride=2), 100, count=1000)
    assert {b - a for window in chosen for a, b in pairwise(window)} == {2}
    assert {window[0] for window in chosen} == set(range(5, 79))  # 78 + 8 * 2 = 94, the last of 5 … 94
    assert max(window[-1] for window in chosen) == 94


@pytest.mark.parametrize("total_frames, stride", [(17, 2), (16, 1), (9, 1), (25, 3), (100, 3)])
def test_fine_tuning_takes_the_largest_stride_that_fits(total_frames, stride):
    config = DataConfig(kind="finetune", num_frames=9)
    for window in windows(config, total_frames, 20):
        assert {b - a for a, b in pairwise(window)} == {stride}
        assert window[0] >= 0 and window[-1] < total_frames


def test_fine_tuning_starts_anywhere_in_the_clip():
    chosen = windows(DataConfig(kind="finetune", num_frames=9), 30)
    assert {window[0] for window in chosen} == set(range(6))


def test_a_window_depends_on_seed_clip_and_variant_alone():
    config = DataConfig(num_frames=9)
    torch.manual_seed(0)
    first = choose_window(config, "a.mp4", 1000, 1)
    torch.manual_seed(1)
    assert choose_window(config, "a.mp4", 1000, 1) == first
    others = [
        choose_window(config, "a.mp4", 1000, 2),
        choose_window(config, "b.mp4", 1000, 1),
        choose_window(DataConfig(num_frames=9, seed=1), "a.mp4", 1000, 1),
    ]
    assert first not in others


def test_the_window_is_the_epoch_modulo_their_number():
    assert [window_variant(DataConfig(num_windows=3), epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    assert window_variant(DataConfig(), 5) == 5


def test_the_chosen_frames_are_what_is_read(clips):
    config = DataConfig(num_frames=5, height=16, width=24, max_stride=2)
    clip = Clip(root=clips, file="3.mp4", caption="a", row=1)
    pixels = read_clip(config, clip, variant=4)
    assert pixels.shape == (5, 3, 16, 24)
    assert pixels.dtype == torch.float32
    indices = ((pixels.mean((1, 2, 3)) + 1) * 127.5 / 4).round().int().tolist()
    assert indices == choose_window(config, "3.mp4", 43, 4)


def test_a_clip_that_is_too_short_is_named(clips):
    clip = Clip(root=clips, file="3.mp4", caption="a", row=1)
    with pytest.raises(
        UnreadableClipError, match=r"3\.mp4 is too short: it has 43 frames, but 49 are needed even at stride 1"
    ):
        read_clip(DataConfig(kind="finetune"), clip, 0)


@pytest.mark.parametrize("failures, max_retries, succeeds", [(2, 2, True), (3, 2, False), (1, 0, False)])
def test_reading_is_tried_again_so_often_and_no_more(clips, monkeypatch, failures, max_retries, succeeds):
    tries = []
    open_video = clips_module.open_video

    def flaky(path):
        tries.append(path)
        if len(tries) <= failures:
            raise OSError("the storage is away")
        return open_video(path)

    monkeypatch.setattr(clips_module, "open_video", flaky)
    config = DataConfig(num_frames=5, height=16, width=24, max_retries=max_retries)
    clip = Clip(root=clips, file="3.mp4", caption="a", row=1)
    if succeeds:
        assert len(read_clip(config, clip, 0)) == 5
    else:
        with pytest.raises(UnreadableClipError, match="the storage is away"):
            read_clip(config, clip, 0)
    assert len(tries) == 1 + min(failures, max_retries)
