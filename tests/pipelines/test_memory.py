import pytest
import torch

from mask2dit.pipelines import memory
from mask2dit.pipelines.memory import MEMORY_MODES, apply_memory_mode, check_memory_mode


class Recorder:
    """Stands for a pipeline and notes what is asked of it, since offloading needs a GPU."""

    def __init__(self, path="pipe", calls=None):
        self.path, self.calls = path, [] if calls is None else calls
        self.dtype = torch.bfloat16

    def __getattr__(self, name):
        return Recorder(f"{self.path}.{name}", self.calls)

    def __call__(self, *args, **kwargs):
        self.calls.append((self.path, args, kwargs))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("full", ["pipe.to"]),
        ("model_offload", ["pipe.enable_model_cpu_offload"]),
        ("sequential_offload", ["pipe.enable_sequential_cpu_offload"]),
        ("fp8", ["pipe.transformer.enable_layerwise_casting", "pipe.enable_model_cpu_offload"]),
    ],
)
def test_each_mode_is_what_diffusers_offers_for_it(mode, expected):
    pipe = Recorder()
    apply_memory_mode(pipe, mode, "cuda")
    assert [path for path, _, _ in pipe.calls] == expected


def test_every_mode_is_covered_and_described():
    assert set(MEMORY_MODES) == {"full", "model_offload", "group_offload", "sequential_offload", "fp8"}


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match=r"full, model_offload, .* but is 'tiny'"):
        check_memory_mode("tiny", "cuda")


@pytest.mark.parametrize("mode", ["model_offload", "group_offload", "sequential_offload"])
def test_offloading_without_a_gpu_is_refused_with_the_remedy(mode):
    with pytest.raises(ValueError, match=f"memory={mode} .* use full"):
        check_memory_mode(mode, "cpu")


def test_fp8_runs_a_pipeline_on_a_cpu_and_stays_close(small_pipeline):
    arguments = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}

    def run():
        return small_pipeline(["a", "b"], **arguments, generator=torch.Generator().manual_seed(0)).frames

    expected = run()
    apply_memory_mode(small_pipeline, "fp8", "cpu")
    weight = small_pipeline.transformer.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn
    error = (run() - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.2


def test_group_offload_changes_no_result_and_never_moves_the_transformer_whole(small_pipeline, monkeypatch):
    arguments = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}

    def run():
        return small_pipeline(["a", "b"], **arguments, generator=torch.Generator().manual_seed(0)).frames

    expected = run()
    monkeypatch.setattr(memory, "check_memory_mode", lambda *args: None)  # the CPU stands for a GPU
    monkeypatch.setattr(small_pipeline.transformer, "to", lambda *args: pytest.fail("moved whole"))
    apply_memory_mode(small_pipeline, "group_offload", "cpu")
    assert (run() == expected).all()
