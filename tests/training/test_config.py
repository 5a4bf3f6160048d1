import pytest

from mask2dit.training.config import ValidationConfig


def test_a_validation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"validation\.every=5 .*validation\.manifest .*validation\.stories"):
        ValidationConfig(every=5)
    assert ValidationConfig(every=5, manifest="held_out.csv").every == 5
    assert ValidationConfig(every=5, stories=[["a"]]).every == 5
