"""Checks that need several processes: `python tests/processes.py FOLDER RANK WORLD_SIZE [NAME …]`, started by the fixture
`run_checks`. Without names, all checks run but the slow ones.

Torch takes seconds to start, so that many checks share one set of processes. Each compares what the processes compute
together with what one of them computes alone, and returns the largest difference relative to the largest expected value.
Rank 0 writes the results to FOLDER/results.json.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

TINY = {
    "num_attention_heads": 12,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
    "use_rotary_positional_embeddings": True,
}
VARIANTS = ("v1", "v2", "v3", "v4", "v5")
CASES = {
    **{f"variant {variant}": {"config": {"mask_variant": variant}} for variant in VARIANTS},
    "equal scenes": {"scene_frames": (3, 3, 3)},
    "one scene": {"scene_frames": (9,)},
    "one timestep per story": {"per_story": True},
    "sin-cos positions": {"config": {"use_rotary_positional_embeddings": False}, "scene_frames": (3, 3, 3)},
    "CogVideoX 1.5": {
        "config": {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
        "scene_frames": (2, 4, 2),
    },
    "gradient checkpointing": {"checkpointed": True},
    "LoRA": {"lora": True},
    "compiled blocks": {"compiled": True},  # takes most of a minute
}


def ulysses(case: dict) -> float:
    """A forward and a backward pass shared by all processes, against one process alone."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig

    from mask2dit import Mask2DiTTransformer3DModel
    from mask2dit.models.parallel import apply_ulysses

    torch.manual_seed(0)
    config = {**TINY, **case.get("config", {})}
    transformer = Mask2DiTTransformer3DModel(**config)
    if case.get("lora"):
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    frames = case.get("scene_frames", (2, 4, 3))
    inputs = {
        "hidden_states": torch.randn(2, sum(frames), 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, len(frames) * 6, 24),
        "timestep": torch.tensor([0, 500, 900][: len(frames)]).repeat(2, 1),
        "scene_frames": frames,
        "attention_kwargs": {"scale": 0.5} if case.get("lora") else None,
        "ofs": torch.tensor([2.0, 3.0]) if "ofs_embed_dim" in config else None,
    }
    if case.get("per_story"):
        inputs["timestep"] = torch.tensor([500, 900])
    target = torch.randn_like(inputs["hidden_states"])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        transformer.zero_grad()
        sample = transformer(**inputs).sample
        (sample - target).square().mean().backward()
        gradients = [parameter.grad for parameter in transformer.parameters() if parameter.requires_grad]
        return sample.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    expected, expected_gradients = run()
    apply_ulysses(transformer, dist.group.WORLD)
    if case.get("checkpointed"):
        transformer.enable_gradient_checkpointing()
    if case.get("compiled"):
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    sample, gradients = run()
    dist.all_reduce(gradients)  # what data parallelism does: an average over all processes
    gradients /= dist.get_world_size()
    return max(difference(sample, expected), difference(gradients, expected_gradients))


def pipeline(case: dict) -> float:
    """A story whose guidance is divided, if possible, and whose scenes are decoded by all processes, against one process."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler

    from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
    from mask2dit.pipelines.parallel import Processes
    from mask2dit.pipelines.story import decode_scene

    rank, size = dist.get_rank(), dist.get_world_size()
    cfg = case["cfg"]
    if size % cfg:
        return 0.0
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = Mask2DiTPipeline(None, None, vae, Mask2DiTTransformer3DModel(**TINY), scheduler)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 1, 3, 6, 24)
    context = torch.randn(1, 2, 4, 8, 12)

    def run() -> torch.Tensor:
        return pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            num_frames=(5, 9, 5),
            context_latents=context,
            scene_mask=[True, True, False],
            num_inference_steps=8,
            use_dynamic_cfg=True,
            context_refresh=4,
            guidance_interval=case.get("guidance_interval"),
            context_guidance=case.get("context_guidance", False),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    expected = run()
    mesh = dist.init_device_mesh("cpu", (cfg, size // cfg), mesh_dim_names=("cfg", "ulysses"))
    groups = {name: mesh.get_group(name) if mesh[name].size() > 1 else None for name in ("cfg", "ulysses")}
    processes = Processes(rank, size, guidance_group=groups["cfg"], ulysses_group=groups["ulysses"])
    processes.apply(pipe)
    error = difference(run(), expected)
    scenes = expected.split((2, 3, 2), dim=1)
    for frames, scene in zip(processes.decode(pipe, scenes, torch.device("cpu")), scenes, strict=True):
        if rank == 0:
            assert np.array_equal(frames, decode_scene(pipe, scene))
        else:
            assert frames is None
    return error


def context_cache(case: dict) -> float:
    """The second of two calls with a context cache, shared by all processes, against one process alone."""
    import torch
    import torch.distributed as dist

    from mask2dit import Mask2DiTTransformer3DModel
    from mask2dit.models.context_cache import ContextCache
    from mask2dit.models.parallel import apply_ulysses

    torch.manual_seed(0)
    transformer = Mask2DiTTransformer3DModel(**TINY, **case)
    latents, text = torch.randn(2, 9, 4, 8, 12), torch.randn(2, 18, 24)

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache = ContextCache((False, True, False), 2, dtype="auto")
        for timestep in (900, 500):
            timesteps = torch.tensor([[0, timestep, 0]] * 2)
            sample = transformer(
                latents + timestep / 1000, text, timesteps, None, (2, 4, 3), context_cache=cache
            ).sample
        return sample

    expected = run()
    apply_ulysses(transformer, dist.group.WORLD)
    return difference(run(), expected)


def exchanged_bytes(case: dict) -> float:
    """The bytes that the benchmark counts in a forward pass, against those that its formula predicts."""
    import importlib.util

    import torch
    import torch.distributed as dist

    from mask2dit import Mask2DiTTransformer3DModel
    from mask2dit.models.parallel import apply_ulysses

    spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parents[1] / "benchmarks/parallel.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    transformer = Mask2DiTTransformer3DModel(**TINY)
    apply_ulysses(transformer, dist.group.WORLD)
    counter = benchmark.Counter()
    try:
        with torch.no_grad():
            transformer(torch.randn(1, 9, 4, 8, 12), torch.randn(1, 18, 24), torch.tensor([500]))
    finally:
        counter.remove()
    size = dist.get_world_size()
    layout = transformer.scene_layout(8, 12, (3, 3, 3))
    gathered = sum(-(-length // size) for length in layout.video_lengths) * 16 * 4 * (size - 1)
    expected = benchmark.exchanged_bytes(layout, 192, 2, size, itemsize=4) + gathered
    return abs(counter.sent / expected - 1)


def difference(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


CHECKS = {f"ulysses, {name}": (ulysses, case) for name, case in CASES.items()}
CHECKS |= {f"pipeline, cfg={cfg}": (pipeline, {"cfg": cfg}) for cfg in (1, 2)}
# Guides steps 2 and 3, so that there are guided and unguided steps of all scenes and of generated ones alone.
CHECKS |= {
    f"pipeline, cfg={cfg}, guidance interval": (pipeline, {"cfg": cfg, "guidance_interval": (500, 800)})
    for cfg in (1, 2)
}
CHECKS |= {
    f"pipeline, cfg={cfg}, context guidance": (pipeline, {"cfg": cfg, "context_guidance": True}) for cfg in (1, 2)
}
CHECKS |= {f"context cache, {variant}": (context_cache, {"mask_variant": variant}) for variant in ("v2", "v3")}
CHECKS |= {"exchanged bytes": (exchanged_bytes, {})}
SLOW = {"ulysses, compiled blocks"}


def main(folder: Path, rank: int, world_size: int, names: Sequence[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    for name in names or [name for name in CHECKS if name not in SLOW]:
        check, case = CHECKS[name]
        try:
            result = check(case)
        except Exception:  # of any kind: it is the result of this check
            result = traceback.format_exc()
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, result)
        failed = [result for result in everywhere if isinstance(result, str)]
        results[name] = failed[0] if failed else max(everywhere)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
