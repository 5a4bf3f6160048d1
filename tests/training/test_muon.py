import pytest
import torch
from torch import distributed, multiprocessing, nn

from mask2dit.training.muon import Muon, adamw_scale, spectral_scale

SHAPES = ((40, 16), (16, 40), (16, 16), (8, 24), (16, 16))


@pytest.mark.parametrize("shape", [(16, 40), (16, 4, 3, 3), (40, 16)])
def test_a_step_goes_along_an_orthogonal_matrix(shape):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, scale=spectral_scale).step()
    singular = torch.linalg.svdvals(weight.detach().flatten(1))
    usual = max(1, shape[0] / weight[0].numel()) ** 0.5

    assert ((singular / usual > 0.6) & (singular / usual < 1.3)).all()
    assert (weight.detach() * weight.grad).sum() < 0, "it goes up"


@pytest.mark.parametrize("scale, torchs", [(spectral_scale, "original"), (adamw_scale, "match_rms_adamw")])
def test_matrices_take_the_steps_of_torchs_muon(scale, torchs):
    ours, theirs = _weights(), _weights()
    _steps(Muon(ours, lr=0.1, scale=scale, weight_decay=0.1))
    _steps(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn=torchs))

    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_processes_that_divide_the_work_take_the_same_steps_as_one(tmp_path):
    alone = _weights()
    _steps(Muon(alone, lr=0.1, scale=adamw_scale))
    multiprocessing.spawn(_steps_of_a_process, (tmp_path,), nprocs=2)

    for rank in range(2):
        for one, other in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.equal(one, other)


def _weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _steps(optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def _steps_of_a_process(rank: int, folder) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    weights = _weights()
    _steps(Muon(weights, lr=0.1, scale=adamw_scale))
    torch.save(weights, folder / f"{rank}.pt")
    distributed.destroy_process_group()
