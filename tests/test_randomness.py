import torch

from mask2dit.randomness import generator_for


def draw(*what):
    return torch.randn(4, generator=generator_for(*what)).tolist()


def test_a_generator_depends_on_its_arguments_alone():
    first = draw(0, 1, 2, "noise")
    torch.manual_seed(3)
    assert draw(0, 1, 2, "noise") == first
    assert first not in [draw(1, 1, 2, "noise"), draw(0, 12, "noise"), draw(0, 2, 1, "noise"), draw(0, 1, 2, "time")]
