import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.data.cache import LatentCache, build_cache
from mask2dit.data.config import CacheConfig
from mask2dit.data.order import Position
from mask2dit.data.quarantine import QuarantineError
from mask2dit.hashing import fingerprint
from mask2dit.training import checkpoints
from mask2dit.training.callbacks import Logging, Validation
from mask2dit.training.config import LoRATrainingConfig, ValidationConfig
from mask2dit.training.engine import SampleGroup
from mask2dit.training.launch import launch as launch_processes
from mask2dit.training.memory import estimate_memory
from mask2dit.training.optimizer import trained_parameters
from mask2dit.training.run import plan_training
from mask2dit.training.trainer import learning_rate, scene_mask

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


def weights(config, path=WEIGHTS):
    return load_file(Path(config.output_dir) / path)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def compile_without_code(transformer, **options):
    for block in transformer.transformer_blocks:
        block.compile(**options, backend="aot_eager")


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def test_pretraining_then_fine_tuning_then_sampling(config, run, clips, tmp_path):
    pretraining = config(output_dir=str(tmp_path / "pretrain"))
    assert run(pretraining) == 0
    tuning = config(
        model=str(tmp_path / "pretrain/model"),
        output_dir=str(tmp_path / "sft"),
        data__kind="finetune",
        data__manifest=str(clips / "sft.json"),
        conditional_probability=0.5,
    )
    assert run(tuning) == 0
    pipe = Mask2DiTPipeline.from_pretrained(tmp_path / "sft/model")
    frames = pipe(["a", "b", "c"], height=64, width=96, num_frames=9, num_inference_steps=2).frames
    assert frames.shape == (1, 27, 64, 96, 3)
    before, after = weights(pretraining), weights(tuning)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_one_sample_can_be_learned_by_heart(config, run, metrics, monkeypatch):
    # The same sample with the same noise at the same timestep in every step.
    monkeypatch.setattr("mask2dit.data.order.PositionSampler.__iter__", lambda self: iter([(0, 0)] * len(self)))
    memorising = config(
        max_steps=150, batch_size=1, learning_rate=2e-3, warmup_steps=10, max_grad_norm=1.0, checkpoint_every=1000
    )
    run(memorising)
    values = losses(metrics(memorising))
    assert min(values[-5:]) < values[0] / 10


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "muon"}, {"compile": True, "attention_backend": "_native_math"}], ids=str
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    config, run, metrics, tmp_path, monkeypatch, changes
):
    # Without a compiler, which would take most of a minute.
    monkeypatch.setattr(Mask2DiTTransformer3DModel, "compile_repeated_blocks", compile_without_code)
    whole = config(output_dir=str(tmp_path / "whole"), ema_decay=0.9, max_steps=4, **changes)
    run(whole)
    parts = replace(whole, output_dir=str(tmp_path / "parts"), max_steps=2)
    run(parts)
    parts = replace(parts, max_steps=4, resume="latest")
    run(parts)
    assert_equal(weights(parts), weights(whole))
    last = "checkpoint-00000004/model.safetensors"
    assert_equal(weights(parts, last), weights(whole, last))
    assert losses(metrics(parts)) == losses(metrics(whole))


def test_compiled_blocks_and_another_attention_backend_give_the_same_losses(
    config, run, metrics, tmp_path, monkeypatch
):
    plain = config(output_dir=str(tmp_path / "plain"), max_steps=2)
    run(plain)
    calls = []
    monkeypatch.setattr(
        Mask2DiTTransformer3DModel, "compile_repeated_blocks", lambda *args, **options: calls.append(options)
    )
    attention = torch.nn.attention.sdpa_kernel
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: calls.append(backend) or attention(backend))
    fast = replace(plain, output_dir=str(tmp_path / "fast"), attention_backend="_native_math", compile=True)
    run(fast)
    # Each shape is compiled by itself: what validation draws in between must not change the code of the training steps.
    assert calls[0] == {"dynamic": False} and torch.nn.attention.SDPBackend.MATH in calls
    assert losses(metrics(fast)) == pytest.approx(losses(metrics(plain)), rel=1e-5)


def test_a_checkpoint_from_before_a_setting_existed_counts_as_its_default(config, run):
    run(config(max_steps=2))
    (path,) = checkpoints.checkpoints(config().output_dir)
    state = json.loads((path / checkpoints.STATE).read_text())
    del state["config"]["compile"]
    (path / checkpoints.STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"another configuration: compile \(False then, True now\)"):
        run(config(resume="latest", compile=True))
    assert run(config(resume="latest", max_steps=3)) == 0


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_two_processes_stopped_and_resumed_take_the_same_steps_as_one(
    config, run, launch, metrics, tmp_path, deepspeed
):
    one = config(output_dir=str(tmp_path / "one"))
    run(one)
    path = deepspeed and str(ROOT / f"configs/deepspeed/{deepspeed}.json")
    two = config(output_dir=str(tmp_path / "two"), deepspeed=path, micro_batch_size=1)
    for part in (replace(two, max_steps=2, resume="auto"), replace(two, resume="auto")):
        result = launch(part, processes=2)
        assert result.returncode == 0, result.stderr
    expected, found = metrics(one), metrics(two)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-3)
    assert [line["learning_rate"] for line in found] == [line["learning_rate"] for line in expected]
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_processes_that_share_samples_take_the_steps_of_one_and_resume_without_sharing(
    config, run, launch, metrics, tmp_path, deepspeed
):
    draws = {"text_dropout": 0.5, "conditional_probability": 0.5}
    one = config(output_dir=str(tmp_path / "one"), max_steps=2 if deepspeed else 3, **draws)
    run(one)
    path = deepspeed and str(ROOT / f"configs/deepspeed/{deepspeed}.json")
    two = replace(one, output_dir=str(tmp_path / "two"), deepspeed=path, sequence_parallel=2, max_steps=2)
    resumed = replace(two, sequence_parallel=1, max_steps=3, resume="latest")
    for part in (two,) if deepspeed else (two, resumed):
        result = launch(part, processes=2)
        assert result.returncode == 0, result.stderr
    expected, found = metrics(one), metrics(two)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-3)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_clipping_bounds_the_step(config, launch, tmp_path, deepspeed):
    """With a plain sum of gradients a step of SGD-like size would show; with AdamW the second moment does."""
    path = str(ROOT / "configs/deepspeed/zero2.json") if deepspeed else None
    bound = 1e-3
    clipped = config(
        output_dir=str(tmp_path / "clipped"), max_steps=1, checkpoint_every=1, max_grad_norm=bound, deepspeed=path
    )
    result = launch(clipped)
    assert result.returncode == 0, result.stderr
    folder = Path(clipped.output_dir) / "checkpoint-00000001"
    if deepspeed:
        (file,) = folder.rglob("*_optim_states.pt")
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        moments = [value["exp_avg"] for value in (state["state"].values() if "state" in state else state)]
    else:
        state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
        moments = [value["exp_avg"] for value in state.values()]
    # After one step the first moment is a tenth of the gradient that the optimizer was given.
    norm = torch.sqrt(sum(moment.float().square().sum() for moment in moments)) * 10
    assert float(norm) == pytest.approx(bound, rel=1e-2)


def test_deepspeed_compiles_nothing_on_a_cpu(config, launch, tmp_path):
    result = launch(config(max_steps=1, deepspeed=str(ROOT / "configs/deepspeed/zero2.json")))
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "compiled").exists()


# A run under nohup, as these tests may be, ignores SIGHUP.
HEED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"


def wait_for_steps(config, is_alive):
    log = Path(config.output_dir) / "metrics.jsonl"
    while is_alive() and not (log.is_file() and log.read_text().count("\n") >= 2):
        time.sleep(0.05)


def assert_stopped(config, status, errors, number):
    """Asserts that a run saved and said so. Returns the step."""
    assert status == 75, errors
    assert errors.count(f"stopped by {number.name}") == 1
    assert "exitcode" not in errors and "Traceback" not in errors
    (checkpoint,) = checkpoints.checkpoints(config.output_dir)
    return int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_saves_and_ends_with_its_own_status(config, start, run, metrics, number):
    long = config(max_steps=1000, checkpoint_every=1000)
    (process,) = start(long, before=HEED)
    wait_for_steps(long, process.is_alive)
    os.kill(process.pid, number)
    process.join(timeout=120)
    step = assert_stopped(long, process.exitcode, process.errors(), number)
    resumed = config(max_steps=step + 1, checkpoint_every=1000, resume="latest")
    assert run(resumed) == 0
    assert [line["step"] for line in metrics(resumed)] == list(range(1, step + 2))


def test_a_signal_to_the_launcher_saves_and_ends_with_its_own_status(config, launcher, tmp_path):
    """Even if threads abort while Python ends, as gloo's do that release a tensor then, after everything was saved."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    )
    long = config(max_steps=1000, checkpoint_every=1000)
    process = launcher(long, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    wait_for_steps(long, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert_stopped(long, process.returncode, errors, signal.SIGTERM)


@pytest.mark.parametrize("end, status", [("pass", 0), ("exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_launcher_ends_with_the_status_of_what_it_launched(tmp_path, capfd, end, status):
    program = tmp_path / "program.py"
    program.write_text(f"import os, signal\nif os.environ['RANK'] == '1': {end}\n")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert launch_processes(["--nproc_per_node=2", "--standalone", str(program)]) == status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "Traceback" not in capfd.readouterr().err


def test_an_expected_error_of_two_processes_has_no_traceback(config, launch):
    result = launch(config(model="nowhere"), processes=2)
    assert result.returncode == 1
    assert "error: there is no model in" in result.stderr and "Traceback" not in result.stderr


def test_processes_that_see_different_checkpoints_end_with_an_error_before_a_step(config, run, launch, metrics):
    """As where each node has an output folder of its own, or shows a checkpoint late."""
    first = config(max_steps=2)
    run(first)
    blind = "import mask2dit.training.run as r\nif os.environ['RANK'] == '1': r.find_checkpoint = lambda config: None"
    result = launch(replace(first, max_steps=4, resume="auto"), processes=2, before=blind)
    assert result.returncode == 1
    assert "checkpoint-00000002 (process 0), no checkpoint (process 1)" in result.stderr
    assert [line["step"] for line in metrics(first)] == [1, 2]


def test_a_process_killed_while_saving_leaves_the_last_good_checkpoint(config, run, launch, metrics):
    killed = config(max_steps=4)
    run(replace(killed, max_steps=2))
    # accelerate saves the weights with safetensors and then the optimizer with torch.save: the kill falls between the two.
    kill = "import signal; torch.save = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)"
    result = launch(replace(killed, resume="latest"), before=kill)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (partial,) = Path(killed.output_dir).glob(".checkpoint-00000004.partial")
    assert [path.name for path in partial.iterdir()] == ["model.safetensors"]
    assert [path.name for path in checkpoints.checkpoints(killed.output_dir)] == ["checkpoint-00000002"]
    assert run(replace(killed, resume="latest")) == 0
    assert [line["step"] for line in metrics(killed)] == [1, 2, 3, 4]
    assert not list(Path(killed.output_dir).glob(".*"))


def test_only_so_many_checkpoints_are_kept(config, run):
    run(config(checkpoint_every=1, keep_checkpoints=2))
    names = [path.name for path in checkpoints.checkpoints(config().output_dir)]
    assert names == ["checkpoint-00000003", "checkpoint-00000004"]


@pytest.mark.parametrize("pipeline_class", [Mask2DiTPipeline, CogVideoXPipeline])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_an_exported_lora_predicts_what_the_trainers_transformer_does(
    config, run, small_model, monkeypatch, pipeline_class, ema_decay
):
    outputs = {}

    def predict(transformer):
        generator = torch.Generator().manual_seed(0)
        text_shape = (1, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
        inputs = (torch.randn(shape, generator=generator) for shape in ((1, 3, 16, 8, 12), text_shape))
        with torch.no_grad():
            return transformer.eval()(*inputs, torch.tensor([500])).sample

    def note(self, trainer):
        transformer = trainer.accelerator.unwrap_model(trainer.transformer)
        outputs["last"] = predict(transformer)
        if trainer.ema:
            trainer.ema.copy_to(trained_parameters(transformer))
            outputs["averaged"] = predict(transformer)

    monkeypatch.setattr(Logging, "on_end", note)  # after the export
    tuned = config(
        lora=LoRATrainingConfig(rank=2, alpha=16),
        max_steps=3,
        learning_rate=0.1,
        ema_decay=ema_decay,
        max_grad_norm=10.0,
    )
    run(tuned)
    transformer = Mask2DiTTransformer3DModel.from_pretrained(small_model)
    before = predict(transformer)
    pipe = pipeline_class(None, None, Mask2DiTPipeline.skeleton(small_model).vae, transformer, None)
    pipe.load_lora_weights(Path(tuned.output_dir) / "lora")
    after = predict(pipe.transformer)
    torch.testing.assert_close(after, outputs["averaged" if ema_decay else "last"])
    assert (after - before).abs().max() > 1e-3
    if ema_decay:
        assert (after - outputs["last"]).abs().max() > 1e-3


def test_validation_logs_losses_and_draws_stories(config, run, metrics, clips):
    validation = ValidationConfig(
        every=2,
        manifest=str(clips / "pretrain.csv"),
        num_samples=1,
        timesteps=[100, 900],
        stories=[["a", "b", "c"], ["d", "e", "f"]],
        num_inference_steps=1,
    )
    validated = config(max_steps=2, validation=validation, trackers=["tensorboard"])
    run(validated)
    (line,) = [line for line in metrics(validated) if "validation/normal_100" in line]
    assert {"validation/normal_900", "validation/extension_100", "validation/extension_900"} <= line.keys()
    folder = Path(validated.output_dir)
    drawn = {f"{number:02d}_{task}" for number in range(2) for task in ("extension", "fixed")}
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {f"00000002_{name}.{suffix}" for name in drawn for suffix in ("mp4", "png")}
    events = EventAccumulator(str(folder / "mask2dit")).Reload()
    assert {"loss", "validation/normal_100"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {f"samples/{name}" for name in drawn}


@pytest.mark.parametrize("num_processes, num_samples", [(2, 1), (2, 3), (3, 2), (3, 8)])
def test_validation_counts_every_sample_once_however_many_processes_share_them(
    config, monkeypatch, num_processes, num_samples
):
    """Losses are the samples' own numbers, and every process makes as many forward passes as the others."""
    forward_passes = []
    monkeypatch.setattr("mask2dit.training.callbacks.collate", lambda samples: samples[0])
    monkeypatch.setattr(
        "mask2dit.training.callbacks.diffusion_loss",
        lambda *_, latents, **__: forward_passes.append(latents) or torch.tensor(float(latents)),
    )

    class Held:
        def __len__(self):
            return 4

        def __getitem__(self, position: Position):
            return position.position + 1

    validation = Validation(Held())

    def losses(rank, num_processes):
        forward_passes.clear()
        accelerator = SimpleNamespace(device="cpu", autocast=nullcontext, reduce=lambda sums, how: sums)
        trainer = SimpleNamespace(
            config=config(validation=ValidationConfig(num_samples=num_samples, timesteps=[100])),
            accelerator=accelerator,
            group=SampleGroup(rank, num_processes),
            transformer=None,
            pipe=SimpleNamespace(scheduler=None),
            inputs=lambda sample, text_dropout: {"latents": sample},
        )
        return validation._losses(trainer)["validation/normal_100"], len(forward_passes)

    alone, _ = losses(0, 1)
    shared = [losses(rank, num_processes) for rank in range(num_processes)]
    assert alone == pytest.approx(sum(range(1, min(num_samples, 4) + 1)) / min(num_samples, 4))
    assert sum(loss for loss, _ in shared) == pytest.approx(alone)
    assert len({passes for _, passes in shared}) == 1


def test_two_processes_share_the_stories_that_validation_draws(config, launch):
    stories = [[letter] * 3 for letter in "abc"]
    validation = ValidationConfig(every=1, stories=stories, num_inference_steps=1)
    path = str(ROOT / "configs/deepspeed/zero3.json")  # where no process may be a forward pass behind
    validated = config(max_steps=1, validation=validation, deepspeed=path, trackers=["tensorboard"])
    result = launch(validated, processes=2)
    assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(Path(validated.output_dir) / "mask2dit")).Reload()
    assert len(events.Tags()["images"]) == 6
    assert len(list((Path(validated.output_dir) / "samples").glob("*.mp4"))) == 6


def test_text_dropout_replaces_all_texts_of_a_sample(config, run, metrics, tmp_path):
    plain, dropped = (
        config(output_dir=str(tmp_path / str(share)), max_steps=1, text_dropout=share) for share in (0.0, 1.0)
    )
    run(plain)
    run(dropped)
    assert losses(metrics(plain)) != losses(metrics(dropped))


def test_validation_drops_no_texts(config, run, metrics, clips, tmp_path):
    validation = ValidationConfig(every=1, manifest=str(clips / "pretrain.csv"), num_samples=1, timesteps=[500])
    rows = []
    for share in (0.0, 1.0):
        changes = {"text_dropout": share, "max_steps": 1, "learning_rate": 1e-12, "validation": validation}
        validated = config(output_dir=str(tmp_path / str(share)), **changes)
        run(validated)
        rows += [line for line in metrics(validated) if "loss" not in line]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_the_learning_rate_rises_linearly_and_stays(config):
    rates = [learning_rate(config(warmup_steps=4, max_steps=6), step) for step in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_learning_rate_falls_linearly_to_zero_over_the_last_steps(config):
    rates = [learning_rate(config(warmup_steps=0, decay_steps=4, max_steps=6), step) for step in range(6)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_which_scenes_are_given():
    draw = torch.Generator().manual_seed(0)
    assert scene_mask(3, 0.0, "last", draw).tolist() == [True] * 3
    assert scene_mask(3, 1.0, "last", draw).tolist() == [False, False, True]
    seen = {tuple(scene_mask(3, 1.0, "random", draw).tolist()) for _ in range(200)}
    assert len(seen) == 6  # every subset but none and all
    share = sum(not scene_mask(3, 0.5, "last", draw).all() for _ in range(400)) / 400
    assert 0.4 < share < 0.6


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_samples(config, run, monkeypatch):
    monkeypatch.setattr(
        "mask2dit.training.trainer.diffusion_loss",
        lambda transformer, *args, **kwargs: next(transformer.parameters()).sum() * torch.tensor([float("nan")]),
    )
    with pytest.raises(FloatingPointError, match=r"loss of step 1 .*clip_\d\.mp4"):
        run(config())


def test_what_ends_a_worker_of_the_data_is_one_sentence(config, run, clips, tmp_path):
    manifest = tmp_path / "broken.csv"
    manifest.write_text((clips / "pretrain.csv").read_text().replace("clip_", "gone_"))
    broken = config(data__manifest=str(manifest), data__data_root=str(clips), num_workers=1, max_steps=1)
    with pytest.raises(QuarantineError, match=r"of 8 clips could not be read") as error:
        run(broken)
    assert "\n" not in str(error.value)


def test_a_dry_run_reads_no_weights_and_prints_what_is_needed(config, run, capsys, monkeypatch):
    monkeypatch.setattr("mask2dit.training.run.load_pipeline", lambda *args: pytest.fail("weights were read"))
    assert run(config(dry_run=True)) == 0
    printed = capsys.readouterr().out
    for words in ("parameters", "tokens per sample", "weights", "gradients", "optimizer", "activations"):
        assert words in printed


def test_a_dry_run_knows_that_processes_share_samples(config, small_model, monkeypatch):
    skeleton = Mask2DiTPipeline.skeleton(small_model, configs_only=True)
    alone, shared = (estimate_memory(config(sequence_parallel=n), skeleton, 2) for n in (1, 2))
    assert (shared.tokens, shared.own_tokens) == (alone.tokens, alone.tokens / 2)
    assert shared.activations == alone.activations / 2
    assert f"({shared.own_tokens:,} per process)" in str(shared)
    heads = skeleton.transformer.config.num_attention_heads
    monkeypatch.setenv("WORLD_SIZE", str(heads + 1))
    with pytest.raises(ValueError, match=f"sequence_parallel={heads + 1} .* {heads} attention heads"):
        plan_training(config(sequence_parallel=heads + 1))


def test_a_dry_run_needs_configurations_only(config, run, small_model, capsys, tmp_path):
    configs = tmp_path / "configs"
    shutil.copytree(small_model, configs, ignore=shutil.ignore_patterns("*.safetensors", "*.model", "tokenizer"))
    changes = {"model": str(configs), "data__cache": str(tmp_path / "cache"), "data__num_windows": 1}
    assert run(config(dry_run=True, **changes)) == 0
    assert "parameters" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="weights"):
        run(config(**changes))


def test_a_run_stores_what_it_was_made_with(config, run):
    run(config(max_steps=1))
    record = json.loads((Path(config().output_dir) / "run.json").read_text())
    assert record["config"]["learning_rate"] == 1e-3 and "torch" in record["versions"] and "git_commit" in record


DRAWN = ValidationConfig(every=1, stories=[["a", "b", "c"]])
BAD = {
    "a shift of timesteps to nowhere": ({"timestep_shift": 0.0}, "timestep_shift=0.0"),
    "context noise out of range": ({"conditional_probability": 0.5, "context_noise": 1000}, "context_noise=1000"),
    "context noise without context": ({"conditional_probability": 0.0, "context_noise": 50}, "context_noise=50"),
    "no model": ({"model": "nowhere"}, "no model in '.*nowhere'"),
    "no manifest": ({"data__manifest": "nowhere.csv"}, "nowhere.csv"),
    "too many scenes": ({"data__num_scenes": 9}, "num_scenes=9"),
    "bad frames": ({"data__num_frames": 10}, "num_frames=10 .* 9 or 13"),
    "bad height": ({"data__height": 70}, "height=70 .* 64 or 80"),
    "a batch that does not divide": ({"batch_size": 3, "micro_batch_size": 2}, "batch_size=3 does not divide .* 2 and 4"),
    "too few processes to share samples": ({"sequence_parallel": 2}, "sequence_parallel=2 does not divide the 1 process"),
    "nothing to resume": ({"resume": "latest"}, "no checkpoint in .* to resume"),
    "an unknown checkpoint": ({"resume": "nowhere"}, "'nowhere' is not a checkpoint"),
    "no DeepSpeed file": ({"deepspeed": "nowhere.json"}, "no DeepSpeed configuration 'nowhere.json'"),
    "EMA with DeepSpeed": ({"deepspeed": str(ROOT / "configs/deepspeed/zero2.json"), "ema_decay": 0.9}, "ema_decay=0.9"),
    "8 bits with DeepSpeed": (
        {"deepspeed": str(ROOT / "configs/deepspeed/zero2.json"), "optimizer": "adamw8bit"},
        "adamw8bit cannot be used with deepspeed",
    ),
    "Muon with DeepSpeed": (
        {"deepspeed": str(ROOT / "configs/deepspeed/zero2.json"), "optimizer": "muon"},
        "muon cannot be used with deepspeed",
    ),
    "DeepSpeed without torchrun": ({"deepspeed": str(ROOT / "configs/deepspeed/zero2.json")}, "torchrun"),
    "a LoRA of unknown layers": (
        {"lora": LoRATrainingConfig(rank=2, target_modules=["to_q", "to_kk", "attn1"])}, "to_kk, attn1 .* to_k, to_out.0"
    ),
    "a LoRA of no layers": ({"lora": LoRATrainingConfig(rank=2, target_modules=[])}, "lora.target_modules .* empty"),
    "fp16 on a CPU": ({"precision": "fp16"}, "fp16 needs a GPU: use bf16 or fp32"),
    "8 bits without bitsandbytes": ({"optimizer": "adamw8bit"}, "needs a GPU and bitsandbytes"),
    "a story of another length": (
        {"validation": ValidationConfig(stories=[["one", "two"]])},
        "a story of validation.stories has 2 texts, but data.num_scenes=3",
    ),
    "an unknown attention backend": ({"attention_backend": "flesh"}, "attention_backend has to be one of .* 'flesh'"),
    "an attention backend for GPUs": ({"attention_backend": "flash"}, "flash needs a GPU: on a CPU use native"),
    "an attention backend without gradients": ({"attention_backend": "flex"}, "flex cannot train on a CPU"),
    "compiled blocks with ZeRO stage 3": (
        {"deepspeed": str(ROOT / "configs/deepspeed/zero3.json"), "compile": True},
        "compile=true cannot be used with ZeRO stage 3",
    ),
    "no held-out clips": ({"validation": ValidationConfig(every=1, manifest="held_out.csv")}, "held_out.csv"),
    "a timestep too late": ({"validation": replace(DRAWN, timesteps=[1000])}, "1000 has to be between 0 and 999"),
    "too many validation steps": ({"validation": replace(DRAWN, num_inference_steps=1001)}, "1001"),
    "an unknown variant": ({"mask_variant": "v6"}, "but is 'v6'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input_ends_before_weights_are_read(config, run, monkeypatch, changes, message):
    monkeypatch.setattr("mask2dit.training.run.load_pipeline", lambda *args: pytest.fail("weights were read"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(config(**changes))
    assert "\n" not in str(error.value)


def test_a_tracker_that_is_not_installed_is_refused(config, run, monkeypatch):
    monkeypatch.setattr("mask2dit.training.run.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run(config(trackers=["tensorboard"]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"deepspeed": str(ROOT / "configs/deepspeed/zero2.json")}, "pip install deepspeed"),
        ({"precision": "fp16"}, "precision=fp16 needs a GPU"),
        ({"optimizer": "adamw8bit"}, "needs a GPU and bitsandbytes"),
        ({"attention_backend": "flash"}, "attention_backend=flash needs a GPU"),
        ({"output_dir": str(Path(__file__) / "run")}, "test_run.py"),
    ],
)
def test_what_only_this_machine_lacks_is_refused_except_in_a_dry_run(config, run, monkeypatch, changes, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("mask2dit.training.engine.find_spec", lambda name: None)
    monkeypatch.setattr("mask2dit.training.run.load_pipeline", lambda *args: pytest.fail("weights were read"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=message):
        run(config(**changes))
    assert run(config(**changes, dry_run=True)) == 0


def test_lora_with_zero_stage_3_is_refused(config, run):
    with pytest.raises(ValueError, match="use stage 2"):
        run(config(lora=LoRATrainingConfig(rank=2), deepspeed=str(ROOT / "configs/deepspeed/zero3.json")))


def test_another_runs_folder_and_another_configuration_are_refused(config, run):
    run(config(max_steps=2))
    with pytest.raises(FileExistsError, match="holds another run"):
        run(config())
    with pytest.raises(ValueError, match=r"another configuration: learning_rate \(0.001 then, 0.002 now\)"):
        run(config(resume="latest", learning_rate=2e-3))


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 7}, "train_batch_size=7, .* makes it 2"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 5}, "gradient_clipping=5, .* makes it 1.0"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16="),
        ({"zero_optimization": {"stage": 4}}, "has to be 1, 2 or 3, but is 4"),
        ({}, "a stage in zero_optimization"),
    ],
)
def test_a_deepspeed_file_cannot_contradict_the_configuration(config, run, tmp_path, contents, message):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        run(config(deepspeed=str(path)))


def test_the_cache_and_the_videos_give_the_same_losses(config, run, metrics, tmp_path):
    from_videos = config(output_dir=str(tmp_path / "videos"), data__num_windows=1)
    run(from_videos)
    data = replace(from_videos.data, cache=str(tmp_path / "cache"))
    build_cache(CacheConfig(model=from_videos.model, data=data, dtype="float32", device="cpu"))
    from_cache = replace(from_videos, output_dir=str(tmp_path / "cached"), data=data)
    run(from_cache)
    assert losses(metrics(from_cache)) == losses(metrics(from_videos))


def test_a_cached_run_checks_its_model_and_fingerprints_its_encoders_once(config, run, tmp_path, monkeypatch):
    cached = config(data__num_windows=1, data__cache=str(tmp_path / "cache"), text_dropout=1.0, max_steps=2)
    calls = {"skeleton": [], "fingerprint": [], "embeddings": []}

    def count(name, function):
        def counted(*args, **kwargs):
            calls[name].append(args)
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(Mask2DiTPipeline, "skeleton", count("skeleton", Mask2DiTPipeline.skeleton))
    for module in ("mask2dit.data.cache", "mask2dit.pipelines.prompt_cache"):
        monkeypatch.setattr(f"{module}.fingerprint", count("fingerprint", fingerprint))
    monkeypatch.setattr(LatentCache, "embeddings", count("embeddings", LatentCache.embeddings))
    build_cache(CacheConfig(model=cached.model, data=cached.data, dtype="float32", device="cpu"))
    assert (len(calls["skeleton"]), len(calls["fingerprint"])) == (1, 3)  # VAE, text encoder and tokenizer
    run(cached)
    assert (len(calls["skeleton"]), len(calls["fingerprint"])) == (2, 6)
    assert [caption for _, caption in calls["embeddings"]].count("") == 1
