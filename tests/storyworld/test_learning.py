import json
import os
import signal

import pytest
import torch
from torch import nn

from mask2dit.command import PREEMPTED
from mask2dit.storyworld.learning import LearningConfig, learn, schedule, split_parameters


class Line(nn.Module):
    """A small network that can learn sin(x)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def error(self, step):
        x = torch.rand(32, 1, generator=torch.Generator().manual_seed(step)) * 6
        return (self.layers(x) - x.sin()).square().mean()


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        values = {"output_dir": str(tmp_path / "run"), "max_steps": 60, "batch_size": 1, "evaluate_every": 30}
        return LearningConfig(**{**values, "precision": "fp32", "ema_decay": 0.9, "warmup_steps": 5, **changes})

    return make


@pytest.fixture
def run():
    """Learns, until SIGTERM comes in step number `stop`. Returns the status and the weights."""

    def start(config, stop=None):
        model = Line()

        def losses(step):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": model.error(step)}

        status = learn(config, model, losses, lambda step: {"error": model.error(10**6).item()})
        return status, model.state_dict()

    return start


def metrics(config):
    return [json.loads(line) for line in open(f"{config.output_dir}/metrics.jsonl")]


def test_the_measured_error_falls(config, run):
    status, _ = run(config(max_steps=150))
    lines = metrics(config())

    assert status == 0
    assert [line["step"] for line in lines] == [30, 60, 90, 120, 150]
    assert lines[-1]["error"] < lines[0]["error"] / 1.5


def test_a_run_stopped_by_sigterm_goes_on_to_the_same_weights(config, run, tmp_path):
    _, whole = run(config(output_dir=str(tmp_path / "whole")))

    status, _ = run(config(), stop=40)
    assert status == PREEMPTED
    status, parts = run(config())

    assert status == 0
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [line["error"] for line in metrics(config())] == [
        line["error"] for line in metrics(config(output_dir=str(tmp_path / "whole")))
    ]


def test_a_finished_run_is_left_as_it_is(config, run):
    _, first = run(config())
    status, second = run(config(), stop=0)  # no step is taken, so no signal comes

    assert status == 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(metrics(config())) == 2


def test_another_configuration_is_refused_by_name(config, run):
    run(config())

    with pytest.raises(ValueError, match=r"max_steps \(60 then, 70 now\)"):
        run(config(max_steps=70))


def test_a_loss_that_is_not_finite_ends_the_run(config):
    model = Line()

    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        learn(config(), model, lambda step: {"loss": model.error(step) * float("nan")}, lambda step: {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": 0}, "max_steps=0 has to be at least 1"),
        ({"learning_rate": 0}, "learning_rate=0 has to be positive"),
        ({"warmup_steps": -1}, "warmup_steps=-1 cannot be negative"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 has to be between 0 and 1"),
        ({"precision": "fp8"}, "precision has to be one of fp32, bf16, but is 'fp8'"),
    ],
)
def test_bad_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_learning_rate_rises_then_falls_to_zero(config):
    shares = [schedule(config(max_steps=105), step) for step in range(106)]

    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[55] == pytest.approx(0.5)
    assert shares[105] == pytest.approx(0)
    assert shares[5:] == sorted(shares[5:], reverse=True)


def test_muon_trains_layers_but_no_embeddings_norms_or_narrow_outputs():
    model = nn.ModuleDict(
        {"conv": nn.Conv3d(3, 8, 3), "out": nn.Conv3d(8, 3, 3), "embed": nn.Embedding(9, 8), "norm": nn.LayerNorm(8)}
    )
    matrices, rest = split_parameters(model)

    assert [id(weight) for weight in matrices] == [id(model["conv"].weight)]
    assert len(matrices) + len(rest) == len(list(model.parameters()))
