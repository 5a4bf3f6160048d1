import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel

from mask2dit.training.callbacks import Validation
from mask2dit.training.checkpoints import checkpoints
from mask2dit.training.config import ValidationConfig
from mask2dit.training.trainer import Trainer

pytestmark = pytest.mark.slow


def test_a_run_resumed_with_more_accumulation_steps_takes_the_same_steps(config, run, metrics):
    whole = config(micro_batch_size=2, max_steps=2, checkpoint_every=1)
    run(whole)
    expected = metrics(whole)
    after_one_pass = str(checkpoints(whole.output_dir)[0])
    run(replace(whole, micro_batch_size=1, resume=after_one_pass))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in metrics(whole)] == pytest.approx([line[name] for line in expected], rel=1e-3)


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


VALIDATION = ValidationConfig(every=1, stories=[["a", "b", "c"]])


def test_a_stop_signal_is_heeded_before_a_validation(config, run, metrics, monkeypatch):
    step = Trainer._step

    def step_and_be_stopped(trainer, batches):
        signal.raise_signal(signal.SIGTERM)
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_step", step_and_be_stopped)
    monkeypatch.setattr(Validation, "_draw", lambda *args: pytest.fail("the run was validated"))
    stopped = config(validation=VALIDATION)
    assert run(stopped) == 75
    assert [path.name for path in checkpoints(stopped.output_dir)] == ["checkpoint-00000001"]
    assert [line["step"] for line in metrics(stopped)] == [1]


def test_a_step_is_saved_before_its_validation(config, run, monkeypatch):
    saved = []
    monkeypatch.setattr(
        Validation, "_draw", lambda self, trainer, *_: saved.append(checkpoints(trainer.config.output_dir)[-1].name)
    )
    run(config(max_steps=2, validation=VALIDATION, checkpoint_every=1000))
    assert saved == ["checkpoint-00000001", "checkpoint-00000002"]
