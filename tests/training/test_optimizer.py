import pytest
import torch

from mask2dit.training.config import TrainConfig
from mask2dit.training.optimizer import create_optimizer

LEARNING_RATE = 1e-2


@pytest.fixture
def step(make_transformer):
    """Makes one step with random gradients. Returns the transformer and how far each weight moved."""

    def take(optimizer: str):
        transformer = make_transformer().float()
        before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
        config = TrainConfig(optimizer=optimizer, learning_rate=LEARNING_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for weight in transformer.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        create_optimizer(config, transformer).step()
        return {name: weight.detach() - before[name] for name, weight in transformer.named_parameters()}

    return take


def test_muon_moves_the_matrices_of_the_blocks_alike_in_all_directions_and_adamw_the_rest(step):
    moved, by_adamw = step("muon"), step("adamw")
    assert moved.keys() == by_adamw.keys()
    for name, change in moved.items():
        if name.startswith("transformer_blocks.") and change.ndim == 2:
            singular = torch.linalg.svdvals(change) / (LEARNING_RATE * 0.2 * max(change.shape) ** 0.5)
            assert 0.6 < singular.median() < singular.max() < 1.4, name
        else:
            assert torch.equal(change, by_adamw[name]), name


def test_a_learning_rate_set_on_muon_reaches_both_parts_also_after_loading(make_transformer):
    transformer = make_transformer()
    optimizer = create_optimizer(TrainConfig(optimizer="muon"), transformer)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [weight.detach().clone() for weight in transformer.parameters()]
    for weight in transformer.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(map(torch.equal, before, transformer.parameters()))
