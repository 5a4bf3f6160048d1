import numpy as np
import pytest

from mask2dit.evaluation.consistency import (
    chunked_semantic_score,
    semantic_score,
    sequence_score,
    similarity_matrix,
    visual_scores,
    within_scene_score,
)

EVERYBODY = [{"Actor1"}] * 3


def visual(features, actors=EVERYBODY):
    return visual_scores(similarity_matrix(np.array(features)), actors)


def test_scenes_that_look_alike_score_100_whatever_the_length_of_their_features():
    assert all(value == pytest.approx(100) for value in visual([[3, 4], [6, 8], [0.3, 0.4]]).values())


def test_scenes_that_share_nothing_score_0_and_opposite_ones_minus_100():
    assert visual(np.eye(3))["visual"] == pytest.approx(0)
    assert visual([[1, 0], [-2, 0]])["visual"] == pytest.approx(-100)


def test_each_variant_takes_its_own_pairs():
    # 1·2 = 0.6, 2·3 = 0.8, 1·3 = 0
    scores = visual([[1, 0], [0.6, 0.8], [0, 1]], [{"Actor1"}, {"Actor1", "Actor2"}, {"Actor3"}])
    assert scores["visual"] == pytest.approx(100 * (0.6 + 0.8 + 0) / 3)
    assert scores["visual_adjacent"] == pytest.approx(70)
    assert scores["visual_minimum"] == pytest.approx(0)
    assert scores["visual_first_last"] == pytest.approx(0)
    assert scores["visual_shared_actor"] == pytest.approx(60)


def test_without_pairs_there_is_no_score():
    assert set(visual([[1, 0]]).values()) == {None}
    assert visual(np.eye(2), [{"Actor1"}, {"Actor2"}])["visual_shared_actor"] is None
    assert sequence_score(None, 20.0) is None


def test_semantic_and_sequence_are_the_papers_means():
    semantic = semantic_score(np.array([[1.0, 0], [0, 2]]), np.array([[5.0, 0], [3, 4]]))
    assert semantic == pytest.approx(100 * (1 + 0.8) / 2)
    assert sequence_score(70.0, semantic) == pytest.approx(80)
    with pytest.raises(ValueError, match="1 texts for 2 scenes"):
        semantic_score(np.eye(2), np.eye(2)[:1])


def test_chunks_are_averaged_within_a_scene_before_scenes_are():
    chunks = [np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 1]])]
    assert chunked_semantic_score(np.eye(2), chunks) == pytest.approx(100 * (0.5 + 1) / 2)


def test_a_scene_is_compared_with_its_own_other_half():
    assert within_scene_score(np.eye(2), np.array([[2.0, 0], [1, 0]])) == pytest.approx(50)


@pytest.mark.parametrize("bad", [[np.nan, 1], [0, 0], [np.inf, 0]])
def test_features_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match="not finite or is zero"):
        similarity_matrix(np.array([bad, [1.0, 0]]))
