import pytest
import torch

from mask2dit import SceneLayout
from mask2dit.models.masks import MASK_VARIANTS, dense_mask

LAYOUT = SceneLayout((1, 1), (1, 2))  # T1 T2 V1 V2 V2


def test_v2_ties_text_to_its_scene_and_lets_all_video_see_each_other():
    mask = [
        [1, 0, 1, 0, 0],
        [0, 1, 0, 1, 1],
        [1, 0, 1, 1, 1],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
    ]
    assert torch.equal(dense_mask(LAYOUT, "v2"), torch.tensor(mask, dtype=torch.bool))


@pytest.mark.parametrize(
    "variant, text_text, text_video, video_video",
    [("v1", 0, 0, 0), ("v2", 0, 0, 1), ("v3", 1, 0, 1), ("v4", 0, 1, 1), ("v5", 1, 1, 1)],
)
def test_variants_differ_in_what_crosses_scenes(variant, text_text, text_video, video_video):
    mask = dense_mask(LAYOUT, variant)
    assert mask[0, 1] == bool(text_text)
    assert mask[0, 3] == mask[1, 2] == bool(text_video)
    assert mask[2, 3] == bool(video_video)


@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_every_mask_is_symmetric_and_never_hides_a_scene_from_itself(variant):
    mask = dense_mask(SceneLayout((2, 3, 1), (4, 1, 5)), variant)
    assert torch.equal(mask, mask.T)
    assert mask.diagonal().all()


@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_one_scene_sees_all_of_itself(variant):
    assert dense_mask(SceneLayout((2,), (3,)), variant).all()


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="v1, v2, v3, v4, v5, but is 'v6'"):
        dense_mask(LAYOUT, "v6")
