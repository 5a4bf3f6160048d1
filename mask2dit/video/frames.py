"""Choosing the frames of a scene, and converting them to model input and back. Pure functions without file access."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange


def frame_stride(total_frames: int, num_frames: int, max_stride: int = 3) -> int:
    """The largest stride in `max_stride` … 1 at which `num_frames` frames fit in a clip of `total_frames`.

    Raises:
        ValueError: if they do not fit even at stride 1, or if `num_frames` or `max_stride` is not positive.
    """
    if num_frames < 1 or max_stride < 1:
        raise ValueError(f"num_frames and max_stride must be at least 1, but got {num_frames} and {max_stride}")
    if total_frames < num_frames:
        raise ValueError(
            f"the clip has {total_frames} frames, but {num_frames} are needed; take a longer clip or lower num_frames"
        )
    if num_frames == 1:
        return max_stride
    return min(max_stride, (total_frames - 1) // (num_frames - 1))


def choose_frames(
    total_frames: int,
    num_frames: int,
    max_stride: int = 3,
    start: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Indices of `num_frames` evenly spaced frames, at the largest stride that fits (see `frame_stride`).

    Args:
        total_frames: frames in the clip.
        num_frames: frames to choose.
        max_stride: the largest step between two chosen frames.
        start: "center" takes the frames from the middle of the clip, "random" from a random place.
        generator: the source of randomness for a random start.

    Raises:
        ValueError: if the clip is too short, `start` is unknown, or a random start comes without a generator.
    """
    stride = frame_stride(total_frames, num_frames, max_stride)
    room = total_frames - ((num_frames - 1) * stride + 1)
    if start == "center":
        first = room // 2
    elif start == "random":
        if generator is None:
            raise ValueError('start="random" needs a torch.Generator; pass generator=torch.Generator().manual_seed(…)')
        first = int(torch.randint(room + 1, (1,), generator=generator, device=generator.device))
    else:
        raise ValueError(f'start must be "center" or "random", but got {start!r}')
    return [first + stride * k for k in range(num_frames)]


def middle_frames(start: int, stop: int, num_frames: int = 8) -> list[int]:
    """The middle frames of `num_frames` equal intervals of `start … stop - 1`; frames repeat if there are fewer.

    Raises:
        ValueError: if the interval is empty.
    """
    if stop <= start:
        raise ValueError(f"frames {start} to {stop} hold no frame")
    return [start + int((i + 0.5) * (stop - start) / num_frames) for i in range(num_frames)]


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize to cover `height` x `width` at the same aspect ratio, crop the centre, scale to [-1, 1].

    Args:
        frames: `uint8 (F, H, W, 3)`.
        height, width: the target size in pixels.

    Returns:
        `float32 (F, 3, height, width)` in [-1, 1].

    Raises:
        ValueError: if `frames` is not uint8 of shape (F, H, W, 3).
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), but got {frames.dtype} {tuple(frames.shape)}")
    source_height, source_width = frames.shape[1:3]
    scale = max(height / source_height, width / source_width)
    # Rounding may leave the size one pixel short.
    size = (max(height, round(source_height * scale)), max(width, round(source_width * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2

    output = torch.empty(len(frames), 3, height, width, device=frames.device)
    # One frame at a time: a float copy of a whole 4K clip would take several gigabytes.
    for frame, target in zip(frames, output):
        image = rearrange(frame, "h w c -> 1 c h w").float()
        if size != (source_height, source_width):
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        target.copy_(image[0, :, top : top + height, left : left + width])
    return output.div_(127.5).sub_(1.0).clamp_(-1.0, 1.0)  # interpolation may overshoot by a rounding error


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Convert floats in [0, 1] to uint8, rounded; values outside are clipped. Any shape.

    Raises:
        ValueError: if `video` does not have a float type, or contains NaN.
    """
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"video must hold floats in [0, 1], but its dtype is {video.dtype}")
    num_nan = int(np.isnan(video).sum())
    if num_nan:
        raise ValueError(
            f"{num_nan} of {video.size} video values are NaN; the model or the VAE overflowed, try bfloat16 or float32"
        )
    return np.rint(np.clip(video, 0.0, 1.0) * 255.0).astype(np.uint8)
