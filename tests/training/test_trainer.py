from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel

from mask2dit.training.trainer import Trainer

pytestmark = pytest.mark.slow


def test_a_run_resumed_with_more_accumulation_steps_takes_the_same_steps(config, run, metrics, tmp_path):
    whole = config(output_dir=str(tmp_path / "whole"), micro_batch_size=2, max_steps=2)
    run(whole)
    parts = replace(
        whole, output_dir=str(tmp_path / "parts"), max_steps=1
    )  # saved after an odd number of forward passes
    run(parts)
    run(replace(parts, max_steps=2, micro_batch_size=1, resume="latest"))
    expected, found = metrics(whole), metrics(parts)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-3)


def test_a_moving_average_is_loaded_onto_the_device_of_the_run():
    average = EMAModel([torch.zeros(2)])
    saved = average.state_dict()  # accelerate reads it onto the CPU
    trainer = object.__new__(Trainer)
    trainer.ema = average
    trainer.accelerator = SimpleNamespace(
        device=torch.device("meta"), load_state=lambda folder: average.load_state_dict(saved)
    )
    trainer.load("checkpoint")
    assert [weight.device.type for weight in average.shadow_params] == ["meta"]
