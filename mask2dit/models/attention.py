"""Attention under the dual mask as a few unmasked calls, one for each set of keys that some queries share.

For v2 these are T_i over [T_i, V_i] and V_i over [T_i, V_1 … V_S] ("grouped attention" of the paper), for v5 a single
call. No mask is built, so every kernel of diffusers' dispatcher (flash, sage, cuDNN, native, …) can run it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from mask2dit.models.masks import cross_scene
from mask2dit.scenes import SceneLayout

Run = tuple[int, int]  # (first, last + 1) of consecutive blocks


def attention_groups(num_scenes: int, variant: str) -> list[tuple[tuple[Run, ...], tuple[Run, ...]]]:
    """The attention calls that make up a mask variant, in terms of blocks: 0 … S-1 are the scenes' texts, S … 2S-1 their
    videos, as they follow one another in the sequence.

    Returns:
        (queries, keys) of each call as runs of blocks. Every block is a query of exactly one call. Blocks that touch are
        one run, so that contiguous tokens are a view and not a copy.
    """
    cross = cross_scene(variant)
    texts, videos = tuple(range(num_scenes)), tuple(range(num_scenes, 2 * num_scenes))
    queries_by_keys: dict[tuple[Run, ...], list[int]] = {}
    for blocks, sees_text, sees_video in (
        (texts, cross.text_text, cross.text_video),
        (videos, cross.text_video, cross.video_video),
    ):
        for scene, block in enumerate(blocks):
            keys = (texts if sees_text else texts[scene : scene + 1]) + (
                videos if sees_video else videos[scene : scene + 1]
            )
            queries_by_keys.setdefault(_runs(keys), []).append(block)
    return [(_runs(queries), keys) for keys, queries in queries_by_keys.items()]


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SceneLayout, variant: str, backend=None
) -> torch.Tensor:
    """Attention of N tokens under a mask variant.

    Keys and values of a call are concatenated for that call alone: in inference one such pair, at most (N, H, D) each,
    is alive at a time, and the last scene of v2 needs none, since `[T_S | V_1 … V_S]` is contiguous. In training,
    autograd keeps the pair of every call until the backward pass: for v2 (S - 1) copies of the video's keys and values a
    layer, or of one layer only where blocks are checkpointed.

    Args:
        query, key, value: (B, N, H, D), tokens in the order of `layout`.
        backend: an attention backend of diffusers; None for the active one.

    Returns:
        (B, N, H, D).
    """
    edges = (0, *accumulate(layout.text_lengths + layout.video_lengths))  # where each block begins
    outputs = []
    for queries, keys in attention_groups(layout.num_scenes, variant):
        output = dispatch_attention_fn(
            _take(query, queries, edges), _take(key, keys, edges), _take(value, keys, edges), backend=backend
        )
        outputs += zip(queries, output.split([edges[last] - edges[first] for first, last in queries], dim=1))
    if len(outputs) == 1:
        return outputs[0][1]
    return torch.cat([output for _, output in sorted(outputs, key=lambda item: item[0])], dim=1)


class Mask2DiTAttnProcessor:
    """Joint text and video attention of CogVideoX under the symmetric binary mask.

    Args:
        variant: the mask variant, "v1" … "v5".
    """

    _attention_backend = None  # set by `set_attention_backend`, which passes by processors without this attribute

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

        if image_rotary_emb is not None:
            video = slice(layout.text_length, None)
            query[:, video] = apply_rotary_emb(query[:, video], image_rotary_emb, sequence_dim=1)
            key[:, video] = apply_rotary_emb(key[:, video], image_rotary_emb, sequence_dim=1)

        output = grouped_attention(query, key, value, layout, self.variant, self._attention_backend)
        output = attn.to_out[0](output.flatten(2))
        output = attn.to_out[1](output)
        text, video = output.split([layout.text_length, layout.video_length], dim=1)
        return video, text


def _runs(blocks: Sequence[int]) -> tuple[Run, ...]:
    """Joins neighbours; blocks come in ascending order."""
    runs: list[Run] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return tuple(runs)


def _take(tokens: torch.Tensor, runs: tuple[Run, ...], edges: tuple[int, ...]) -> torch.Tensor:
    """The tokens of these blocks: (B, N, H, D) -> (B, n, H, D); a view where it is one run."""
    parts = [tokens[:, edges[first] : edges[last]] for first, last in runs]
    if len(parts) == 1:
        return parts[0]
    # What is copied anyway is laid out head by head, (B, H, n, D) in memory, from which kernels read keys faster.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=2).transpose(1, 2)
