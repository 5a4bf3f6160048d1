import pytest

from mask2dit import SceneLayout


def test_text_of_all_scenes_comes_before_the_video_of_all_scenes():
    layout = SceneLayout((3, 4), (5, 6))
    assert layout.text_spans == ((0, 3), (3, 7))
    assert layout.video_spans == ((7, 12), (12, 18))
    assert (layout.num_scenes, layout.text_length, layout.video_length, layout.length) == (2, 7, 11, 18)


def test_a_layout_from_lists_is_hashable_and_equal_to_one_from_tuples():
    assert hash(SceneLayout([3], [5])) == hash(SceneLayout((3,), (5,)))
    assert SceneLayout([3], [5]) == SceneLayout((3,), (5,))


@pytest.mark.parametrize(
    "texts, videos, words", [((), (), "0 text"), ((1,), (1, 2), "1 text lengths and 2 video"), ((1,), (0,), r"\(0,\)")]
)
def test_impossible_lengths_are_refused_with_their_numbers(texts, videos, words):
    with pytest.raises(ValueError, match=words):
        SceneLayout(texts, videos)
