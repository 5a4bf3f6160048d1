import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from mask2dit.pipelines import memory
from mask2dit.pipelines.memory import (
    MEMORY_MODES,
    apply_memory_mode,
    check_memory_mode,
    check_vae_tiles,
    enable_vae_tiling,
)


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


@pytest.fixture
def make_vae():
    """A small random VAE of a base size and number of levels."""

    def make(height, width, levels) -> AutoencoderKLCogVideoX:
        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * levels,
            up_block_types=("CogVideoXUpBlock3D",) * levels,
            block_out_channels=(4,) * levels,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
            sample_height=height,
            sample_width=width,
        ).eval()

    return make


@pytest.mark.parametrize("height, width, levels", [(64, 64, 2), (64, 96, 4), (72, 104, 3), (120, 56, 2), (36, 20, 1)])
def test_tiling_keeps_the_size_of_videos_and_latents(make_vae, height, width, levels):
    vae = make_vae(height, width, levels)
    scale = 2 ** (levels - 1)
    size = (height // scale * scale, width // scale * scale)
    video = torch.zeros(1, 3, 1, *size)
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        vae.enable_tiling()
        enable_vae_tiling(vae)
        check_vae_tiles(vae)
        tiled = vae.encode(video).latent_dist.mode()
        assert vae.tile_sample_min_height < height and vae.tile_sample_min_width < width
        assert tiled.shape == latents.shape
        assert vae.decode(tiled).sample.shape == video.shape


def test_tiles_at_the_published_size_stay_those_of_diffusers(make_vae):
    vae = make_vae(480, 720, 4)
    names = [
        f"tile_{name}_{axis}"
        for name in ("sample_min", "latent_min", "overlap_factor")
        for axis in ("height", "width")
    ]
    before = [getattr(vae, name) for name in names]
    enable_vae_tiling(vae)
    assert vae.use_tiling and [getattr(vae, name) for name in names] == before


def test_tiles_that_change_sizes_are_refused_with_the_remedy(make_vae, small_pipeline):
    vae = make_vae(64, 64, 2)
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"height 32 .*enable_vae_tiling"):
        check_vae_tiles(vae)
    small_pipeline.vae.enable_tiling(tile_sample_min_height=32, tile_overlap_factor_height=0.3)
    with pytest.raises(ValueError, match="height 32 "):
        small_pipeline(["a", "b"])
    with pytest.raises(ValueError, match="base height of 8 pixels is too small"):
        enable_vae_tiling(make_vae(8, 64, 3))
