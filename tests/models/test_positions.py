import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from mask2dit.models.positions import crop_region, grid_positions, rotary_table, sincos_table


@pytest.mark.parametrize("grid", [(30, 45), (30, 30), (15, 45), (48, 84), (16, 24), (1, 7)])
def test_the_crop_region_is_that_of_cogvideox(grid):
    assert crop_region(grid, (30, 45)) == get_resize_crop_region_for_grid(grid, 45, 30)


def test_the_base_grid_has_whole_positions_and_the_table_of_diffusers():
    rows, columns = grid_positions((4, 6), (4, 6))
    assert rows.tolist() == [0, 1, 2, 3]
    table = rotary_table(16, torch.arange(5.0), rows, columns)
    expected = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), temporal_size=5)
    for part, expected_part in zip(table, expected):
        torch.testing.assert_close(part, expected_part)


def test_a_cropped_grid_spans_the_crop_in_equal_steps():
    rows, columns = grid_positions((4, 4), (4, 6))  # a square in the middle of a wide base
    assert rows.tolist() == [0, 1, 2, 3]
    assert columns.tolist() == [1, 2, 3, 4]


def test_one_scene_at_the_base_size_has_the_sincos_table_itself():
    table = get_3d_sincos_pos_embed(32, (6, 4), 3, 1.875, 1.0).unflatten(1, (4, 6))
    assert torch.equal(sincos_table(table, 1, 3, 4, 6), table.flatten(0, 2))


def test_the_sincos_table_of_several_scenes_is_the_base_stretched_over_time_and_cut():
    table = torch.arange(3.0)[:, None, None, None].expand(3, 2, 2, 1)
    stretched = sincos_table(table, 2, 4, 2, 2).reshape(4, 4)
    assert stretched[:, 0].tolist() == [0.0, 0.25, 0.75, 1.25]
