"""The context cache: keys and values of given scenes, kept between denoising steps.

Given scenes are clean and at timestep 0 at every step, so their hidden states change only through what they see of the
generated scenes, which is little. With a context cache, some steps compute all scenes and keep what generated scenes see of
given ones in each layer; the steps between them compute the generated scenes alone.

Shapes: B stories (with guidance, 2 per story), S scenes, N tokens of all scenes, n kept tokens, H heads, D head width.
"""

from collections.abc import Mapping, Sequence

import torch

from mask2dit.config import check_context_cache
from mask2dit.models.attention import GivenTokens
from mask2dit.scenes import SceneLayout

FP8 = torch.float8_e4m3fn


class ContextCache:
    """What generated scenes see of given ones, kept for all layers. It belongs to one call of a pipeline.

    The transformer fills an empty cache from all scenes. With a filled one, it computes generated scenes alone.

    Args:
        generated: (S,) bools, True for each generated scene, False for each given one.
        refresh: compute all scenes at the first and every k-th step.
        device: where the keys and values are kept: "model" (where they are computed) or "cpu". Those on the CPU are copied
            to the model's device layer by layer, each while the layer before it computes.
        dtype: "auto" (as computed) or "fp8", in 8 bits with a scale per story and head.

    Raises:
        ValueError: if no scene is given or none is generated, or for an invalid refresh, device or dtype.
    """

    def __init__(self, generated: Sequence[bool], refresh: int, device: str = "model", dtype: str = "auto"):
        check_context_cache(refresh, device, dtype)
        self.generated = tuple(bool(new) for new in generated)
        self.refresh = refresh
        if all(self.generated) or not any(self.generated):
            raise ValueError(
                f"context_refresh={refresh} needs given and generated scenes, but {sum(self.generated)} of "
                f"{len(self.generated)} scenes are generated: use context_refresh=1"
            )
        self._on_cpu, self._in_fp8 = device == "cpu", dtype == "fp8"
        self._layers: list[tuple[_Kept, _Kept]] = []
        self._sample: torch.Tensor | None = None
        self._was_filled = self._guided = False
        self._stream: torch.cuda.Stream | None = None
        self._fetched: tuple[int, torch.Tensor, torch.Tensor] | None = None

    @property
    def is_filled(self) -> bool:
        return self._sample is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the kept keys and values."""
        return sum(kept.num_bytes for layer in self._layers for kept in layer)

    def start_step(self, step: int, guided: bool) -> bool:
        """Empties the cache at the first and every k-th step, and where guidance begins or ends.

        Args:
            step: number of the denoising step, from 0.
            guided: True if the step computes both branches of guidance.

        Returns:
            True if this step computes other scenes than the step before it.
        """
        if is_refreshed(step, self.refresh, guided, self._guided):
            self._sample, self._fetched = None, None
            self._layers.clear()
        changes = self.is_filled != self._was_filled
        self._was_filled, self._guided = self.is_filled, guided
        return changes

    def select_scenes(self, tokens: torch.Tensor, lengths: Sequence[int], dim: int = 1) -> torch.Tensor:
        """Returns a copy of the generated scenes' part of a tensor, whose dimension `dim` has these lengths of scenes."""
        scenes = tokens.split(list(lengths), dim=dim)
        return torch.cat([scene for scene, new in zip(scenes, self.generated) if new], dim=dim)

    def layer(self, index: int, layout: SceneLayout, like: torch.Tensor) -> GivenTokens:
        """Returns the given scenes' tokens for a layer: empty ones to fill, or the kept ones.

        Args:
            index: number of the layer.
            layout: tokens of all scenes.
            like: (b, …) on the device that computes. Where b is less than the kept B, the last b stories are returned: the
                prompts' half, where a hook leaves out the negative prompts.
        """
        given = GivenTokens(layout, self.generated)
        if not self.is_filled and index == 0:
            self._layers.clear()  # of a call that failed
        if self.is_filled:
            if self._fetched is None or self._fetched[0] != index:
                self._fetch(index, like)
            _, given.key, given.value = self._fetched
            self._fetched = None
            if self._stream is not None:
                current = torch.cuda.current_stream(like.device)
                current.wait_stream(self._stream)
                for tensor in (given.key, given.value):
                    tensor.record_stream(current)
                if index + 1 < len(self._layers):
                    self._fetch(index + 1, like)
        return given

    def keep(self, given: GivenTokens) -> None:
        """Keeps the tokens that the next layer filled.

        Raises:
            RuntimeError: if the layer was skipped.
        """
        if given.key is None or given.value is None:
            raise RuntimeError(
                f"layer {len(self._layers)} was not computed, so there are no keys and values to keep: a cache hook on the "
                "transformer skipped it; reset or disable the hook"
            )
        self._layers.append(tuple(_Kept(tokens, self._on_cpu, self._in_fp8) for tokens in (given.key, given.value)))

    def complete(self, sample: torch.Tensor, scene_frames: Sequence[int]) -> torch.Tensor:
        """Returns the model's output for all scenes, (B, S*F, C, h, w).

        Args:
            sample: the output of the call that filled the cache; or, after it, for generated scenes alone, in which case
                that of given scenes is the one of the call that filled the cache.
            scene_frames: latent frames of each scene.
        """
        if not self.is_filled:
            self._sample = sample
            return sample
        is_generated = torch.tensor(self.generated).repeat_interleave(torch.tensor(scene_frames))
        whole = self._sample[-len(sample) :].clone()
        whole[:, is_generated.nonzero().flatten().to(whole.device)] = sample  # numbers, as the meta device needs them
        return whole

    def _fetch(self, index: int, like: torch.Tensor) -> None:
        """Copies a layer's tokens to the device; from main memory to a GPU, beside the computation."""
        if self._on_cpu and like.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(like.device)
            with torch.cuda.stream(self._stream):
                key, value = (kept.load(len(like), like.device) for kept in self._layers[index])
        else:
            key, value = (kept.load(len(like), like.device) for kept in self._layers[index])
        self._fetched = (index, key, value)


def is_refreshed(step: int, refresh: int, guided: bool, was_guided: bool) -> bool:
    """Returns True for a denoising step that computes given scenes anew: the first, every k-th, and where guidance begins or
    ends."""
    return step % refresh == 0 or guided != was_guided


class _Kept:
    """Keys or values (B, n, H, D), as they are stored."""

    def __init__(self, tokens: torch.Tensor, on_cpu: bool, in_fp8: bool):
        self._dtype = tokens.dtype
        self._scale = None
        if in_fp8 and tokens.shape[1]:
            # The largest number of each head becomes the largest of fp8, beyond which fp8 has NaN alone.
            largest = tokens.abs().amax(dim=(1, 3), keepdim=True).float()  # (B, 1, H, 1)
            self._scale = (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
            tokens = (tokens / self._scale).to(FP8)
        if on_cpu and tokens.is_cuda:
            pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = pinned.copy_(tokens)
        self._tokens = tokens

    @property
    def num_bytes(self) -> int:
        return self._tokens.nbytes + (0 if self._scale is None else self._scale.nbytes)

    def load(self, batch_size: int, device: torch.device) -> torch.Tensor:
        tokens = self._tokens[-batch_size:].to(device, non_blocking=True)
        if self._scale is None:
            return tokens
        return (tokens.float() * self._scale[-batch_size:]).to(self._dtype)


def context_cache_bytes(
    config: Mapping, layout: SceneLayout, generated: Sequence[bool], dtype: torch.dtype, batch_size: int = 1
) -> int:
    """Predicts the bytes that a filled context cache keeps, from a transformer's configuration alone.

    Args:
        config: a transformer's configuration, with `num_layers`, `num_attention_heads`, `attention_head_dim` and
            `mask_variant`.
        layout: tokens of all scenes, as of `Mask2DiTTransformer3DModel.scene_layout`.
        generated: (S,) bools, True for each generated scene, False for each given one.
        dtype: the model's dtype; `torch.float8_e4m3fn` for a cache in fp8.
        batch_size: number of stories, B; with guidance, twice as many.
    """
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    given = GivenTokens(layout, tuple(generated))
    num_tokens = sum(sum(lengths) for lengths in given.lengths(config["mask_variant"]))
    kept = num_tokens * heads * width * dtype.itemsize
    if dtype == FP8 and num_tokens:
        kept += heads * torch.float32.itemsize  # the scales
    return 2 * config["num_layers"] * batch_size * kept
