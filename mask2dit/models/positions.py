"""Positions of video tokens over several scenes: time continues across scenes, as in the published model."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from einops import rearrange, repeat


def crop_region(grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the part of the base grid that a grid covers when fitted into it, with its aspect ratio, and centred.

    Args:
        grid, base_grid: (rows, columns) of tokens.

    Returns:
        (top, left), (bottom, right) in positions of the base grid.
    """
    rows, columns = grid
    base_rows, base_columns = base_grid
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)
    return (top, left), (top + height, left + width)


def grid_positions(
    grid: tuple[int, int], base_grid: tuple[int, int], device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns row and column positions of CogVideoX 1.0: `start + (stop - start) * i / n` over the resized crop region.

    The published model uses these positions. diffusers' own table (0.42) stops at `stop * (n - 1) / n`, which differs if
    the crop does not start at 0.

    Returns:
        (rows,) and (columns,) float32.
    """
    starts, stops = crop_region(grid, base_grid)
    return tuple(
        start + (stop - start) * torch.arange(n, dtype=torch.float32, device=device) / n
        for start, stop, n in zip(starts, stops, grid)
    )


def rotary_table(
    head_dim: int, times: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes rotary embeddings on a grid of positions: a quarter of the head for time, 3/8 for each other axis.

    Args:
        times, rows, columns: (T,), (R,) and (C,) float positions.

    Returns:
        cos and sin, each (T*R*C, head_dim) float32.
    """
    dims = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    tables = [get_1d_rotary_pos_embed(dim, axis, use_real=True) for dim, axis in zip(dims, (times, rows, columns))]
    sizes = {"t": len(times), "r": len(rows), "c": len(columns)}
    return tuple(
        torch.cat(
            [
                repeat(time, "t d -> (t r c) d", **sizes),
                repeat(row, "r d -> (t r c) d", **sizes),
                repeat(column, "c d -> (t r c) d", **sizes),
            ],
            dim=1,
        )
        for time, row, column in zip(*tables)
    )


def sincos_table(base_table: torch.Tensor, num_scenes: int, num_frames: int, rows: int, columns: int) -> torch.Tensor:
    """Computes sin-cos positions of the 2B model for several scenes, as in the published model.

    The base table is resized once, trilinearly, to `num_scenes` times its frames and to the given rows and columns, and
    its first `num_frames` are used. One scene at the base size uses the base table itself.

    Args:
        base_table: (frames, rows, columns, D) of the base size.

    Returns:
        (num_frames * rows * columns, D).
    """
    table = rearrange(base_table, "t r c d -> 1 d t r c")
    table = F.interpolate(
        table, size=(len(base_table) * num_scenes, rows, columns), mode="trilinear", align_corners=False
    )
    return rearrange(table[:, :, :num_frames], "1 d t r c -> (t r c) d")
