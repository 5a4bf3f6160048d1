import numpy as np
import pytest
import torch

from mask2dit.video.frames import choose_frames, frame_stride, middle_frames, resize_and_crop, to_uint8


@pytest.mark.parametrize(
    ("total_frames", "stride"), [(1000, 3), (145, 3), (144, 2), (97, 2), (96, 1), (49, 1)]
)  # 49 frames need 145 at stride 3, 97 at stride 2
def test_the_stride_is_the_largest_that_fits(total_frames, stride):
    assert frame_stride(total_frames, 49) == stride


def test_a_clip_too_short_for_stride_1_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="has 48 frames, but 49 are needed"):
        frame_stride(48, 49)


@pytest.mark.parametrize(("num_frames", "max_stride"), [(0, 3), (49, 0)])
def test_counts_that_are_not_positive_are_refused(num_frames, max_stride):
    with pytest.raises(ValueError, match="at least 1"):
        frame_stride(100, num_frames, max_stride)


def test_one_frame_fits_in_one_frame():
    assert choose_frames(1, 1) == [0]


def test_a_centred_start_leaves_as_much_before_as_after():
    assert choose_frames(11, 3) == [2, 5, 8]
    assert choose_frames(145, 49) == list(range(0, 145, 3))


def test_a_random_start_reaches_every_place_and_stays_inside():
    generator = torch.Generator().manual_seed(0)
    chosen = [choose_frames(10, 3, start="random", generator=generator) for _ in range(200)]
    assert {tuple(indices) for indices in chosen} == {(k, k + 3, k + 6) for k in range(4)}


def test_a_random_start_is_decided_by_the_generator_alone():
    state = torch.get_rng_state()
    first, second = (
        choose_frames(1000, 9, start="random", generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_start_without_a_generator_is_refused():
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        choose_frames(100, 9, start="random")


def test_an_unknown_start_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match='"center" or "random", but got \'middle\''):
        choose_frames(100, 9, start="middle")


@pytest.mark.parametrize("source", [(96, 144), (64, 200), (200, 64), (31, 47), (480, 720), (49, 73)])
def test_every_source_size_is_cropped_to_the_size_wanted_without_padding(source):
    output = resize_and_crop(torch.full((2, *source, 3), 255, dtype=torch.uint8), 48, 72)
    assert output.shape == (2, 3, 48, 72)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.ones_like(output))
    assert output.max() <= 1


def test_bytes_are_scaled_to_minus_one_to_one():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 4, 4, 3)
    torch.testing.assert_close(resize_and_crop(frames, 4, 4)[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_the_centre_is_kept():
    frames = torch.zeros(1, 10, 30, 3, dtype=torch.uint8)
    frames[:, :, 10:20] = 255
    torch.testing.assert_close(resize_and_crop(frames, 10, 10), torch.ones(1, 3, 10, 10))


def test_the_aspect_ratio_is_kept():
    y, x = torch.meshgrid(torch.arange(100) - 49.5, torch.arange(300) - 149.5, indexing="ij")
    disc = (y**2 + x**2 < 40**2).to(torch.uint8) * 255
    output = resize_and_crop(disc[None, :, :, None].expand(1, 100, 300, 3), 50, 50)[0, 0] > 0
    assert output.any(0).sum() == output.any(1).sum() == 40


def test_shrinking_is_antialiased():
    frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    frames[:, :, ::2] = 254  # stripes finer than the target can show come out grey
    inside = resize_and_crop(frames, 16, 16)[..., 2:-2]
    assert inside.abs().max() < 0.1


def test_each_frame_is_resized_on_its_own():
    frames = torch.randint(256, (5, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = resize_and_crop(frames, 8, 8)
    assert torch.equal(together, torch.cat([resize_and_crop(frames[k : k + 1], 8, 8) for k in range(5)]))


@pytest.mark.parametrize("frames", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_frames_that_are_not_bytes_with_channels_last_are_refused(frames):
    with pytest.raises(ValueError, match=r"uint8 \(F, H, W, 3\), but got"):
        resize_and_crop(frames, 8, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_and_clipped_to_bytes(dtype):
    video = np.array([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.7], dtype=dtype)
    assert to_uint8(video).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(video).dtype == np.uint8


def test_nan_is_refused_with_its_count():
    with pytest.raises(ValueError, match="2 of 4 video values are NaN"):
        to_uint8(np.array([0.1, np.nan, np.nan, 1.0]))


def test_bytes_are_not_taken_for_floats():
    with pytest.raises(ValueError, match="uint8"):
        to_uint8(np.zeros(3, dtype=np.uint8))


def test_frames_are_the_middles_of_equal_intervals():
    assert middle_frames(0, 16) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert middle_frames(49, 98) == [52, 58, 64, 70, 76, 82, 88, 94]
    assert middle_frames(0, 2, 4) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="hold no frame"):
        middle_frames(3, 3)
