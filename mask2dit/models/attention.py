"""Attention under the dual mask as a few unmasked calls, one per set of queries that share their keys.

For v2 these are T_i over [T_i, V_i] and V_i over [T_i, V_1 … V_S] ("grouped attention" of the paper), for v5 a single
call. No mask is built, so every kernel of diffusers' dispatcher (flash, sage, cuDNN, native, …) can run it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from mask2dit.models.masks import cross_scene
from mask2dit.models.parallel import ShardedLayout
from mask2dit.scenes import SceneLayout

CPU_BACKENDS = ("native", "_native_math", "flex")

ALL = None  # stands for all scenes in `Keys`

Run = tuple[int, int]  # (first, last + 1) of consecutive blocks
Keys = tuple[int | None, int | None]  # the scene (or ALL) whose text is seen, and the one whose video is


def check_attention_backend(name: str, device: torch.device, is_training: bool = False) -> None:
    """Checks that an attention backend of diffusers can be used.

    Args:
        name: the backend, such as "native" or "flash".
        device: the device that it computes on.
        is_training: True if a backward pass is needed, which sage does not have, nor flex on a CPU.

    Raises:
        ValueError: if the backend is unknown, not installed, or not for this device or for training.
    """
    backends = sorted(backend.value for backend in AttentionBackendName)
    if name not in backends:
        raise ValueError(f"attention_backend has to be one of {', '.join(backends)}, but is {name!r}")
    on_cpu = [backend for backend in CPU_BACKENDS if not (is_training and backend == "flex")]
    if device.type == "cpu" and name not in on_cpu:
        kind = "cannot train on a CPU" if name in CPU_BACKENDS else "needs a GPU"
        raise ValueError(f"attention_backend={name} {kind}: on a CPU use {', '.join(on_cpu)} or null")
    if is_training and name.lstrip("_").startswith("sage"):
        raise ValueError(f"attention_backend={name} has no backward pass: for training use null, or flash on a GPU")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise ValueError(f"attention_backend={name} cannot be used here: {error}") from error


def attention_groups(num_scenes: int, variant: str) -> list[tuple[tuple[Run, ...], Keys]]:
    """Returns the attention calls that make up a mask variant. In the order of the sequence, blocks 0 … S-1 are the scenes'
    texts and S … 2S-1 their videos.

    Returns:
        (queries, keys) of each call: runs of blocks, and the text and video that they see. Every block is a query of exactly
        one call.
    """
    cross = cross_scene(variant)
    queries_by_keys: dict[Keys, list[int]] = {}
    for first, sees_text, sees_video in (
        (0, cross.text_text, cross.text_video),
        (num_scenes, cross.text_video, cross.video_video),
    ):
        for scene in range(num_scenes):
            single = num_scenes == 1  # its own text and video are all there are
            keys = (ALL if sees_text or single else scene, ALL if sees_video or single else scene)
            queries_by_keys.setdefault(keys, []).append(first + scene)
    return [(_runs(queries), keys) for keys, queries in queries_by_keys.items()]


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SceneLayout, variant: str, backend=None
) -> torch.Tensor:
    """Computes attention of N tokens under a mask variant.

    Each call concatenates its own keys and values. In inference, one such pair, at most (N, H, D) each, is alive at a time,
    and none for a call that sees everything. In training, autograd keeps the pair of every call until the backward pass: for
    v2, S copies of the video's keys and values per layer, or of a single layer if blocks are checkpointed.

    Args:
        query, key, value: (B, N, H, D), tokens in the order of `layout`.
        backend: an attention backend of diffusers. None: the active one.

    Returns:
        (B, N, H, D).
    """
    groups = attention_groups(layout.num_scenes, variant)
    edges = (0, *accumulate(layout.text_lengths + layout.video_lengths))  # where each block begins
    runs = sorted(run for queries, _ in groups for run in queries)
    # Split instead of sliced: the backward pass of a split is one concatenation; that of each slice fills N tokens.
    query_runs = dict(zip(runs, query.split([edges[last] - edges[first] for first, last in runs], dim=1)))
    key, value = _Parts(key, layout), _Parts(value, layout)

    outputs = {}
    for queries, keys in groups:
        parts = [query_runs[run] for run in queries]
        output = dispatch_attention_fn(_concatenate(parts), key.take(keys), value.take(keys), backend=backend)
        outputs.update(zip(queries, output.split([part.shape[1] for part in parts], dim=1)))
    return outputs[runs[0]] if len(runs) == 1 else torch.cat([outputs[run] for run in runs], dim=1)


class _Parts:
    """Keys or values (B, N, H, D), split by scene."""

    def __init__(self, tokens: torch.Tensor, layout: SceneLayout):
        self._tokens = tokens
        self._text, self._video = tokens.split([layout.text_length, layout.video_length], dim=1)
        self._texts = self._text.split(layout.text_lengths, dim=1)
        self._videos = self._video.split(layout.video_lengths, dim=1)

    def take(self, keys: Keys) -> torch.Tensor:
        """Returns (B, n, H, D): the text of one scene or of all, then the video of one scene or of all."""
        text, video = keys
        if text is ALL and video is ALL:
            return self._tokens
        return _concatenate(
            [self._text if text is ALL else self._texts[text], self._video if video is ALL else self._videos[video]]
        )


class Mask2DiTAttnProcessor:
    """Joint text and video attention of CogVideoX under the symmetric binary mask.

    Args:
        variant: the mask variant, "v1" … "v5".
    """

    _attention_backend = None  # for `set_attention_backend`, which skips processors without this attribute

    def __init__(self, variant: str):
        cross_scene(variant)
        self.variant = variant

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,  # (B, video tokens, H*D)
        encoder_hidden_states: torch.Tensor,  # (B, text tokens, H*D)
        layout: SceneLayout,
        attention_mask: None = None,  # diffusers' `Attention` always passes one
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,  # (video tokens, D) each
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            raise ValueError("the mask follows from the layout and the variant: attention_mask cannot be given")
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, N, H*D)
        query = attn.to_q(tokens).unflatten(2, (attn.heads, -1))  # (B, N, H, D)
        key = attn.to_k(tokens).unflatten(2, (attn.heads, -1))
        value = attn.to_v(tokens).unflatten(2, (attn.heads, -1))

        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        whole = layout
        if isinstance(layout, ShardedLayout):
            whole = layout.whole
            query, key, value = layout.tokens_to_heads(query, key, value)

        if image_rotary_emb is not None:
            video = slice(whole.text_length, None)
            query[:, video] = apply_rotary_emb(query[:, video], image_rotary_emb, sequence_dim=1)
            key[:, video] = apply_rotary_emb(key[:, video], image_rotary_emb, sequence_dim=1)

        output = grouped_attention(query, key, value, whole, self.variant, self._attention_backend)
        if isinstance(layout, ShardedLayout):
            output = layout.heads_to_tokens(output)
        output = attn.to_out[0](output.flatten(2))
        output = attn.to_out[1](output)
        text, video = output.split([layout.text_length, layout.video_length], dim=1)
        return video, text


def _runs(blocks: Sequence[int]) -> tuple[Run, ...]:
    """Joins neighbouring blocks, which are in ascending order, to runs."""
    runs: list[Run] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return tuple(runs)


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates (B, n_1, H, D), (B, n_2, H, D), … to (B, n, H, D); a single part is returned as is."""
    if len(parts) == 1:
        return parts[0]
    # Stored head by head, (B, H, n, D) in memory, which kernels read faster.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=2).transpose(1, 2)
