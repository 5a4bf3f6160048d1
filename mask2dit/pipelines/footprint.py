"""Predicts the memory and the arithmetic of a generation from shapes alone, without weights and without a GPU.

The model's own forward passes run on torch's meta device, where tensors have shapes and no contents. While they run, the
bytes of living tensors and the floating-point operations are counted. What a device needs besides, its context and the
workspaces of its kernels, is not predicted; `fits` leaves room for it.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKLCogVideoX, ModelMixin
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5EncoderModel

from mask2dit.models.context_cache import ContextCache, is_refreshed
from mask2dit.models.parallel import PredictedGroup
from mask2dit.models.quantization import FORMS, quantized_bytes
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline, VideoShape, in_interval
from mask2dit.pipelines.memory import enable_vae_tiling
from mask2dit.pipelines.story import Window

Model = TypeVar("Model", bound=nn.Module)
GIB = 2**30
CARDS = (16, 24, 48, 80)
"""Memory of common GPUs in GB."""
PREFERRED = ("full", "model_offload", "group_offload", "fp8", "sequential_offload")
"""Memory modes in the order in which they are recommended: exact ones first, the fastest first."""
CPU_MODES = ("full", "fp8")
"""Memory modes without a GPU, likewise."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is active and still alive, on any device."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        for given in tree_leaves((arguments, options)):
            self._note(given, is_new=False)  # weights, of which views may be returned
        results = function(*arguments, **options)
        for result in tree_leaves(results):
            self._note(result, is_new=True)
        return results

    def _note(self, value: object, is_new: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = id(storage)  # torch keeps one Python object per storage
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if is_new else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attends as fused kernels do, which keep no matrix of scores; on the meta device, torch would build it."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is F.scaled_dot_product_attention:
            query, key, value = (
                arguments + tuple(options[name] for name in ("query", "key", "value") if name in options)
            )[:3]
            mask = options.get("attn_mask", arguments[3] if len(arguments) > 3 else None)
            if mask is None:
                return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, False)[0]
        return function(*arguments, **options)


@dataclass(frozen=True)
class Cost:
    """What a computation takes."""

    peak: int = 0
    """The largest number of bytes of living tensors, inputs included and weights excluded."""
    flops: int = 0
    """Floating-point operations of matrix products, convolutions and attention."""


@torch.no_grad()
def measure(compute: Callable[[], object]) -> Cost:
    """Runs a computation, which creates its inputs on the meta device, and returns what it takes."""
    with LiveBytes() as memory, FlopCounterMode(display=False) as counter, _FusedAttention():
        compute()
    return Cost(memory.peak, counter.get_total_flops())


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a component's weights."""

    total: int
    largest_layer: int
    """Of the largest layer, the unit of offloading by layers."""
    two_blocks: int
    """Of two repeated blocks, one that computes and the next one, and of everything outside of blocks."""
    fp8: int
    """Of all weights with those of layers in 8 bits."""


def weight_sizes(module: nn.Module, quantization: str | None = None) -> WeightSizes:
    """Measures the weights of a module on any device, in a form of `mask2dit.models.quantization.FORMS` if one is named."""
    if quantization is not None:
        total = quantized_bytes(module, quantization)
        return WeightSizes(total, total, total, total)  # it is not divided
    layers = [sum(map(_bytes, _own_tensors(layer))) for layer in module.modules()]
    total = _total(module)
    blocks = [_total(block) for block in getattr(module, "transformer_blocks", ())]
    fp8 = total
    if isinstance(module, ModelMixin):
        stored = copy.deepcopy(module)
        stored.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=next(module.parameters()).dtype
        )
        fp8 = _total(stored)
    return WeightSizes(total, max(layers), total - sum(blocks) + 2 * max(blocks, default=0), fp8)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The predicted memory of a generation in bytes, and its arithmetic."""

    weights: Mapping[str, WeightSizes]
    """Weights by component: text_encoder, vae, transformer."""
    activations: Mapping[str, int]
    """Peak of activations while each of these components computes."""
    context_cache: int = 0
    """Keys and values that the context cache keeps while the transformer computes."""
    context_cache_on_gpu: bool = True
    """False if they are kept in main memory."""
    frames: int
    """Decoded frames of one scene in main memory."""
    flops: Mapping[str, int]
    """Floating-point operations of the whole run by component."""
    modes: tuple[str, ...] = PREFERRED
    """Memory modes that can be used, the recommended ones first."""

    @property
    def total_weights(self) -> int:
        return sum(sizes.total for sizes in self.weights.values())

    def on_gpu(self, mode: str) -> int:
        """Predicts the peak of a memory mode on the GPU."""
        return max(
            self._resident(mode, name)
            + self.activations[name]
            + (self.context_cache if name == "transformer" and self.context_cache_on_gpu else 0)
            for name in self.weights
        )

    def in_main_memory(self, mode: str) -> int:
        """Predicts the peak of a memory mode in main memory, where all weights are first loaded."""
        # Group offloading with a stream copies the transformer to pinned memory.
        pinned = self.weights["transformer"].total if mode == "group_offload" else 0
        return self.total_weights + pinned + self.frames + (0 if self.context_cache_on_gpu else self.context_cache)

    def on_cpu(self, mode: str) -> int:
        """Predicts the peak in main memory of one of `CPU_MODES` where the CPU computes, without workspaces."""
        transformer = self.weights["transformer"]
        weights = self.total_weights
        if mode == "fp8":
            weights += transformer.fp8 + transformer.largest_layer - transformer.total
        computing = max(
            weights + activations + (self.context_cache if name == "transformer" else 0)
            for name, activations in self.activations.items()
        )
        return max(computing, self.total_weights) + self.frames  # all weights are first loaded

    def fitting(self, capacity: int) -> list[str]:
        """Returns the memory modes that fit a GPU of `capacity` bytes, the recommended one first."""
        return [mode for mode in self.modes if fits(self.on_gpu(mode), capacity)]

    def fitting_cpu(self, capacity: int) -> list[str]:
        """Returns the memory modes that fit main memory of `capacity` bytes where the CPU computes."""
        return [mode for mode in CPU_MODES if mode in self.modes and self.on_cpu(mode) <= capacity]

    def _resident(self, mode: str, component: str) -> int:
        """Returns the bytes of weights that are on the GPU while a component computes."""
        sizes = self.weights[component]
        is_transformer = component == "transformer"
        return {
            "full": self.total_weights,
            "model_offload": sizes.total,
            "group_offload": sizes.two_blocks if is_transformer else sizes.largest_layer,
            "sequential_offload": sizes.largest_layer,
            # A layer's weights are converted when it computes.
            "fp8": sizes.fp8 + sizes.largest_layer if is_transformer else sizes.total,
        }[mode]


def fits(peak: int, capacity: int) -> bool:
    """Returns True if a predicted peak fits a GPU, with 5% for fragmentation and 1 GiB for its context and workspaces."""
    return 1.05 * peak + GIB <= capacity


class Step(NamedTuple):
    """What a denoising step computes."""

    guided: bool
    """True: both branches of guidance; False: the prompts' alone."""
    complete: bool
    """True: all scenes; False: generated scenes alone, with what a context cache keeps of given ones."""


def count_steps(
    timesteps: Iterable[float],
    guided: bool,
    guidance_interval: Sequence[float] | None = None,
    context_refresh: int = 1,
) -> Counter[Step]:
    """Counts the kinds of steps by which a window with given scenes is denoised.

    Args:
        timesteps: the scheduler's timesteps in order.
        guided: True with classifier-free guidance.
        guidance_interval, context_refresh: as for the pipeline.
    """
    steps, was_guided = Counter(), False
    for number, timestep in enumerate(timesteps):
        is_guided = guided and in_interval(timestep, guidance_interval)
        steps[Step(is_guided, is_refreshed(number, context_refresh, is_guided, was_guided))] += 1
        was_guided = is_guided
    return steps


def predict_footprint(
    skeleton: Mask2DiTPipeline,
    text_encoder: T5EncoderModel,
    shape: VideoShape,
    windows: Sequence[Window],
    *,
    dtype: torch.dtype,
    steps: Mapping[Step, int],
    cfg: int = 1,
    ulysses: int = 1,
    context_guidance: bool = False,
    vae_tiling: bool = False,
    context_cache: int = 0,
    context_cache_on_gpu: bool = True,
    quantization: Mapping[str, str] | None = None,
) -> Footprint:
    """Predicts the footprint of a story.

    Args:
        skeleton: from `Mask2DiTPipeline.skeleton`; configurations are enough.
        text_encoder: from `mask2dit.models.loading.empty_text_encoder`.
        shape: frames and latent frames of the whole story.
        windows: from `plan_windows`.
        dtype: the weights' dtype.
        steps: number of denoising steps of each kind in a window, from `count_steps`. Without given scenes in a window, all
            of its steps are complete.
        cfg: number of processes over which the branches of guidance are divided; the footprint is that of one of them.
        ulysses: number of processes that share each step; likewise.
        context_guidance: as for the pipeline.
        vae_tiling: True decodes in tiles.
        context_cache: bytes that the context cache keeps, see `mask2dit.pipelines.story.context_cache_size`.
        context_cache_on_gpu: False if it keeps them in main memory.
        quantization: forms of components' weights, as for `Mask2DiTPipeline.from_pretrained`.
    """
    # The skeleton's buffers are not on the meta device.
    transformer = _on_meta(skeleton.transformer, dtype)
    vae = _on_meta(skeleton.vae, dtype)
    text_encoder = _on_meta(text_encoder, dtype)
    text_encoder.tie_weights()  # which moving them undoes
    if vae_tiling:
        enable_vae_tiling(vae)
    if ulysses > 1:
        transformer.ulysses_group = PredictedGroup(ulysses)
    text_length = transformer.config.max_text_seq_length
    texts = [_embedding(text_encoder, len(window.scenes), text_length) for window in windows]
    denoised = [_denoising(transformer, window, shape, steps, cfg, context_guidance) for window in windows]
    of_scenes = _coding(vae, windows, shape)
    height, width = (size * skeleton.vae_scale_factor_spatial for size in shape.latent_size[1:])
    return Footprint(
        weights={
            name: weight_sizes(module, (quantization or {}).get(name))
            for name, module in (("text_encoder", text_encoder), ("transformer", transformer), ("vae", vae))
        },
        activations={
            "text_encoder": max(cost.peak for cost in texts),
            "transformer": max(cost.peak for cost in denoised),
            "vae": max(cost.peak for cost in of_scenes),
        },
        context_cache=context_cache,
        context_cache_on_gpu=context_cache_on_gpu,
        modes=tuple(
            mode for mode in PREFERRED if all(mode in FORMS[form].modes for form in (quantization or {}).values())
        ),
        frames=max(shape.frames) * height * width * 3 * 5,  # float32, and 8 bits
        flops={
            "text_encoder": (2 if any(step.guided for step in steps) else 1) * sum(cost.flops for cost in texts),
            "transformer": sum(cost.flops for cost in denoised),
            "vae": sum(cost.flops for cost in of_scenes),
        },
    )


def _embedding(text_encoder: nn.Module, num_texts: int, window: int) -> Cost:
    return measure(lambda: text_encoder(torch.zeros(num_texts, window, dtype=torch.long, device="meta"))[0])


def _denoising(
    transformer: Mask2DiTTransformer3DModel,
    window: Window,
    shape: VideoShape,
    steps: Mapping[Step, int],
    cfg: int,
    context_guidance: bool,
) -> Cost:
    """All steps of a window. Each kind of step is measured once."""
    frames = [shape.latent_frames[scene] for scene in window.scenes]
    isolates = context_guidance and bool(window.context)
    costs: dict[Step, Cost] = {}
    for step in steps:
        parts = (isolates, False) if step.guided and cfg == 1 else (False,)
        cache = None
        if window.context and not step.complete:
            cache = ContextCache([scene in window.new for scene in window.scenes], refresh=2)
            _step(transformer, frames, shape, parts, cache)  # fills it
        costs[step] = _step(transformer, frames, shape, parts, cache)
    return Cost(max(cost.peak for cost in costs.values()), sum(n * costs[step].flops for step, n in steps.items()))


def _step(
    transformer: Mask2DiTTransformer3DModel,
    scene_frames: Sequence[int],
    shape: VideoShape,
    isolated_parts: tuple[bool, ...],
    cache: ContextCache | None,
) -> Cost:
    """One step with these branches, as `Mask2DiTPipeline` takes it."""
    branches = len(isolated_parts)
    config = transformer.config
    text_length = len(scene_frames) * config.max_text_seq_length

    def step():
        latents = torch.empty(1, sum(scene_frames), *shape.latent_size, dtype=transformer.dtype, device="meta")
        embeds = torch.empty(branches, text_length, config.text_embed_dim, dtype=transformer.dtype, device="meta")
        timestep = torch.zeros(branches, len(scene_frames), dtype=torch.long, device="meta")
        rotary = transformer.rotary_embeddings(*shape.latent_size[1:], sum(scene_frames), "meta")
        return transformer(
            torch.cat([latents] * branches),
            embeds,
            timestep,
            image_rotary_emb=rotary,
            scene_frames=tuple(scene_frames),
            return_dict=False,
            context_cache=cache,
            isolated_parts=isolated_parts,
        )[0].float()

    return measure(step)


def _coding(vae: AutoencoderKLCogVideoX, windows: Sequence[Window], shape: VideoShape) -> list[Cost]:
    """The decoding of each generated scene and the encoding of each given one."""
    generated = {scene for window in windows for scene in window.new}
    decoded = [frames for scene, frames in enumerate(shape.latent_frames) if scene in generated]
    encoded = [frames for scene, frames in enumerate(shape.frames) if scene not in generated]
    try:
        of_frames = {frames: _decoding(vae, frames, shape) for frames in set(decoded)}
        of_given = {frames: _encoding(vae, frames, shape) for frames in set(encoded)}
    except RuntimeError as error:
        # diffusers divides very large tensors into stretches of frames that may be too short.
        height, width = (size * 2 ** (len(vae.config.block_out_channels) - 1) for size in shape.latent_size[1:])
        remedy = "a smaller height and width" if vae.use_tiling else "vae_tiling=true or a smaller height and width"
        raise ValueError(f"the VAE cannot code scenes of {height}x{width} pixels ({error}): use {remedy}") from error
    return [of_frames[frames] for frames in decoded] + [of_given[frames] for frames in encoded]


def _decoding(vae: AutoencoderKLCogVideoX, latent_frames: int, shape: VideoShape) -> Cost:
    channels, *size = shape.latent_size
    return measure(
        lambda: vae.decode(torch.empty(1, channels, latent_frames, *size, dtype=vae.dtype, device="meta")).sample
    )


def _encoding(vae: AutoencoderKLCogVideoX, frames: int, shape: VideoShape) -> Cost:
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    size = [n * scale for n in shape.latent_size[1:]]
    return measure(
        lambda: vae.encode(torch.empty(1, 3, frames, *size, dtype=vae.dtype, device="meta")).latent_dist.mode()
    )


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _total(module: nn.Module) -> int:
    return sum(map(_bytes, [*module.parameters(), *module.buffers()]))  # a tensor that modules share counts once


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_meta(module: Model, dtype: torch.dtype) -> Model:
    """Copies a module to the meta device, without diffusers' warning about layers that are kept in float32."""
    copied = copy.deepcopy(module)
    nn.Module.to(copied, "meta", dtype)
    copied.eval()
    return copied
