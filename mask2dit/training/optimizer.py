"""The optimizers: AdamW, 8-bit AdamW and Muon."""

import torch

from mask2dit.training.config import TrainConfig
from mask2dit.training.muon import Muon, adamw_scale


def trained_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes: all, or LoRA's additions."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def create_optimizer(config: TrainConfig, transformer: torch.nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer, for all trained weights."""
    trained = trained_parameters(transformer)
    if config.optimizer == "muon":
        in_blocks = {id(parameter) for parameter in transformer.transformer_blocks.parameters() if parameter.ndim == 2}
        matrices = [parameter for parameter in trained if id(parameter) in in_blocks]
        others = [parameter for parameter in trained if id(parameter) not in in_blocks]
        return MuonWithAdamW(
            Muon(matrices, lr=config.learning_rate, scale=adamw_scale, weight_decay=config.weight_decay),
            _adamw(config, others),
        )
    return _adamw(config, trained)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks and AdamW for the rest, with one learning rate."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([parameter for part in self.parts for parameter in part.param_groups[0]["params"]], {})
        self._share_groups()

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, its_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its_state)
        self._share_groups()

    def _share_groups(self) -> None:
        """Shares the parameter groups with the parts, so that a learning rate set in a group reaches its part."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _adamw(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW  # an optional package; `plan_training` checks for it
    else:
        AdamW = torch.optim.AdamW
    return AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
