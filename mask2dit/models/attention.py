"""Attention under the dual mask as a few unmasked calls, one per set of queries that share their keys.

For v2 these are T_i over [T_i, V_i] and V_i over [T_i, V_1 … V_S] ("grouped attention" of the paper), for v5 a single
call. No mask is built, so every kernel of diffusers' dispatcher (flash, sage, cuDNN, native, …) can run it.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from mask2dit.models.masks import cross_scene
from mask2dit.models.parallel import ShardedLayout
from mask2dit.scenes import SceneLayout

CPU_BACKENDS = ("native", "_native_math", "flex")

ISOLATED = "v1"  # the mask variant in which no scene sees another

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


@contextmanager
def keep_active_backend() -> Generator[None]:
    """Restores the attention backend of the process, which diffusers changes where a backend is set for one model."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def attention_groups(
    num_scenes: int, variant: str, generated: tuple[bool, ...] | None = None
) -> list[tuple[tuple[Run, ...], Keys]]:
    """Returns the attention calls that make up a mask variant. In the order of the sequence, blocks 0 … S-1 are the scenes'
    texts and S … 2S-1 their videos.

    Args:
        num_scenes: S.
        variant: "v1" … "v5".
        generated: (S,) bools. Only scenes marked True are queries, and queries number their G texts 0 … G-1 and their videos
            G … 2G-1; keys still number all S scenes. None: every scene is a query.

    Returns:
        (queries, keys) of each call: runs of blocks, and the text and video that they see. Every block is a query of exactly
        one call.
    """
    cross = cross_scene(variant)
    scenes = [scene for scene in range(num_scenes) if generated is None or generated[scene]]
    queries_by_keys: dict[Keys, list[int]] = {}
    for first, sees_text, sees_video in (
        (0, cross.text_text, cross.text_video),
        (len(scenes), cross.text_video, cross.video_video),
    ):
        for block, scene in enumerate(scenes, start=first):
            single = num_scenes == 1  # its own text and video are all there are
            keys = (ALL if sees_text or single else scene, ALL if sees_video or single else scene)
            queries_by_keys.setdefault(keys, []).append(block)
    return [(_runs(queries), keys) for keys, queries in queries_by_keys.items()]


@dataclass
class GivenTokens:
    """Keys and values of the given scenes in one layer, as far as generated scenes see them.

    The attention processor fills an empty one from all scenes' tokens. With a filled one, it takes the tokens of generated
    scenes alone, and these stand in for the given ones.
    """

    layout: SceneLayout
    """Tokens of all scenes, given and generated."""
    generated: tuple[bool, ...]
    """True for each generated scene, False for each given one."""
    key: torch.Tensor | None = None
    """(B, n, H, D) after norm and rotary positions: texts, then videos, of given scenes. None: empty."""
    value: torch.Tensor | None = None

    def lengths(self, variant: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the kept text tokens and the kept video tokens of each scene, 0 where none are kept.

        A call of generated scenes sees the text of its own scene alone or of all scenes, and likewise the video.
        """
        groups = attention_groups(len(self.generated), variant, self.generated)
        sees_text = any(text is ALL for _, (text, _) in groups)
        sees_video = any(video is ALL for _, (_, video) in groups)
        return (
            tuple(0 if new or not sees_text else n for n, new in zip(self.layout.text_lengths, self.generated)),
            tuple(0 if new or not sees_video else n for n, new in zip(self.layout.video_lengths, self.generated)),
        )

    def part(self, index: int, count: int) -> "GivenTokens":
        """Returns filled tokens of one of `count` equal parts of the batch."""
        return GivenTokens(self.layout, self.generated, self.key.chunk(count)[index], self.value.chunk(count)[index])

    def fill(self, key: torch.Tensor, value: torch.Tensor, variant: str) -> None:
        """Keeps copies of what generated scenes see in the keys and values (B, N, H, D) of all scenes."""
        kept = [length > 0 for lengths in self.lengths(variant) for length in lengths]
        lengths = self.layout.text_lengths + self.layout.video_lengths

        def select(tokens):
            blocks = [block for block, keep in zip(tokens.split(lengths, dim=1), kept) if keep]
            return torch.cat(blocks, dim=1) if blocks else tokens[:, :0].clone()

        self.key, self.value = select(key), select(value)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SceneLayout,
    variant: str,
    backend=None,
    given: GivenTokens | None = None,
) -> torch.Tensor:
    """Computes attention of N tokens under a mask variant.

    Each call concatenates its own keys and values. In inference, one such pair, at most (N, H, D) each, is alive at a time,
    and none for a call that sees everything. In training, autograd keeps the pair of every call until the backward pass: for
    v2, S copies of the video's keys and values per layer, or of a single layer if blocks are checkpointed.

    Args:
        query, key, value: (B, N, H, D), tokens in the order of `layout`.
        layout: the scenes that the tokens belong to.
        variant: "v1" … "v5".
        backend: an attention backend of diffusers. None: the active one.
        given: filled keys and values of given scenes, which the tokens, those of generated scenes alone, also see. None: the
            tokens are those of all scenes.

    Returns:
        (B, N, H, D).
    """
    edges = (0, *accumulate(layout.text_lengths + layout.video_lengths))  # where each block begins
    if given is None:
        groups = attention_groups(layout.num_scenes, variant)
        key, value = _Parts(key, layout), _Parts(value, layout)
    else:
        groups = attention_groups(len(given.generated), variant, given.generated)
        lengths = given.lengths(variant)
        key, value = (
            _JoinedParts(own, layout, kept, lengths, given.generated)
            for own, kept in ((key, given.key), (value, given.value))
        )
    runs = sorted(run for queries, _ in groups for run in queries)
    # Split instead of sliced: the backward pass of a split is one concatenation; that of each slice fills N tokens.
    query_runs = dict(zip(runs, query.split([edges[last] - edges[first] for first, last in runs], dim=1)))

    outputs = {}
    for queries, keys in groups:
        parts = [query_runs[run] for run in queries]
        output = dispatch_attention_fn(_concatenate(parts), key.take(keys), value.take(keys), backend=backend)
        outputs.update(zip(queries, output.split([part.shape[1] for part in parts], dim=1)))
    return outputs[runs[0]] if len(runs) == 1 else torch.cat([outputs[run] for run in runs], dim=1)


class _Parts:
    """Keys or values (B, N, H, D), split by scene."""

    def __init__(self, tokens: torch.Tensor, layout: SceneLayout):
        text, video = tokens.split([layout.text_length, layout.video_length], dim=1)
        self._tokens, self._text, self._video = [tokens], [text], [video]
        self._texts = text.split(layout.text_lengths, dim=1)
        self._videos = video.split(layout.video_lengths, dim=1)

    def take(self, keys: Keys) -> torch.Tensor:
        """Returns (B, n, H, D): the text of one scene or of all, then the video of one scene or of all."""
        text, video = keys
        if text is ALL and video is ALL:
            return _concatenate(self._tokens)
        return _concatenate(
            [
                *(self._text if text is ALL else [self._texts[text]]),
                *(self._video if video is ALL else [self._videos[video]]),
            ]
        )


class _JoinedParts(_Parts):
    """Keys or values of generated scenes (B, N, H, D) and those kept of given ones (B, n, H, D), split by scene.

    Args:
        own, layout: of the generated scenes.
        kept, kept_lengths: of the given scenes; as `GivenTokens.key` and `GivenTokens.lengths`.
        generated: (S,) bools.
    """

    def __init__(self, own, layout: SceneLayout, kept, kept_lengths, generated: tuple[bool, ...]):
        num_generated, num_scenes = layout.num_scenes, len(generated)
        own = own.split(layout.text_lengths + layout.video_lengths, dim=1)
        kept = kept.split(kept_lengths[0] + kept_lengths[1], dim=1)  # empty for generated scenes
        own_texts, own_videos = iter(own[:num_generated]), iter(own[num_generated:])
        self._texts = [next(own_texts) if new else text for new, text in zip(generated, kept[:num_scenes])]
        self._videos = [next(own_videos) if new else video for new, video in zip(generated, kept[num_scenes:])]
        self._text, self._video, self._tokens = self._texts, self._videos, [*self._texts, *self._videos]


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
        given: GivenTokens | None = None,  # filled here if empty; else it stands in for the given scenes
        isolated_parts: tuple[bool, ...] = (False,),  # of the batch, as for the transformer
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

        filled = given if given is not None and given.key is not None else None
        if given is not None and filled is None:
            given.fill(key, value, self.variant)
        count, outputs = len(isolated_parts), []
        for i, isolated in enumerate(isolated_parts):
            part = [tensor.chunk(count)[i] for tensor in (query, key, value)]
            if isolated:
                outputs.append(grouped_attention(*part, whole, ISOLATED, self._attention_backend))
            else:
                kept = filled and filled.part(i, count)
                outputs.append(grouped_attention(*part, whole, self.variant, self._attention_backend, kept))
        output = outputs[0] if count == 1 else torch.cat(outputs)
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
