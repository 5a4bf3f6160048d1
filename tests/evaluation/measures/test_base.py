import pytest

from mask2dit.evaluation.measures.base import Scores


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_by_its_key(value):
    assert Scores({"visual": None, "semantic": 20.0}).values["visual"] is None
    with pytest.raises(ValueError, match=f"semantic is {value}"):
        Scores({"visual": 50.0, "semantic": value})
