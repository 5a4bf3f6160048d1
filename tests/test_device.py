import pytest
import torch

from mask2dit.device import choose_device


def test_a_device_is_chosen_by_name_and_one_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'gpu'"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="device=cuda:1"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
