"""Muon, the optimizer of the small world's models (https://kellerjordan.github.io/posts/muon).

torch's Muon takes matrices only, not convolutions, and repeats all of its work in every process.
"""

from collections.abc import Callable

import torch
from torch import distributed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values to about 1
ITERATIONS = 5


def spectral_scale(rows: int, columns: int) -> float:
    """Muon's own scale, with which one learning rate serves all widths."""
    return max(1, rows / columns) ** 0.5


def adamw_scale(rows: int, columns: int) -> float:
    """A scale that makes steps as large as AdamW's, so that one learning rate serves both (arXiv 2502.16982)."""
    return 0.2 * max(rows, columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized update.

    Orthogonalization, the costly part, is divided among the processes of `torch.distributed` if there are several; all of
    them must have the same gradients.

    Args:
        parameters: weights of at least two dimensions; a convolution counts as a matrix with one row per output channel.
        lr: the learning rate.
        scale: a function from the rows and columns of a matrix to the step size in learning rates.
        momentum: decay rate of the momentum.
        weight_decay: decoupled weight decay, as in AdamW.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float,
        scale: Callable[[int, int], float],
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = group["params"]
            directions = self._directions(weights, group["momentum"])
            for weight, direction in zip(weights, directions, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(direction.view_as(weight), alpha=group["lr"] * self.scale(len(weight), weight[0].numel()))

    def _directions(self, weights: list[torch.nn.Parameter], momentum: float) -> list[torch.Tensor]:
        """The update directions of all weights in order, flattened, in the precision of the weights."""
        rank, processes = 0, 1
        if distributed.is_initialized():
            rank, processes = distributed.get_rank(), distributed.get_world_size()
        flat = torch.zeros(sum(map(torch.numel, weights)), dtype=torch.bfloat16, device=weights[0].device)
        directions = flat.split([weight.numel() for weight in weights])
        # Assigned in order of size, so that every process gets about the same work.
        turns = {place: turn for turn, place in enumerate(sorted(range(len(weights)), key=lambda i: weights[i].shape))}
        for place, (weight, direction) in enumerate(zip(weights, directions, strict=True)):
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            average = state["momentum_buffer"]
            average.lerp_(weight.grad, 1 - momentum)
            if turns[place] % processes == rank:
                ahead = weight.grad.lerp(average, momentum)
                direction.copy_(orthogonal(ahead.flatten(1)).flatten())
        if processes > 1:
            distributed.all_reduce(flat)
        return [direction.to(weight.dtype) for weight, direction in zip(weights, directions, strict=True)]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Approximates the closest matrix whose singular values are all 1, by Newton-Schulz iterations in bfloat16."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    # Of the two products of x with its transpose, the smaller one is cheaper.
    x = (matrix.T if is_tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
