"""Ulysses: one forward pass of the transformer on several processes (Jacobs et al. 2023, arXiv 2309.14509).

Each scene's text and video are divided over the processes of a group in equal shares, of which the last may be padded. All
layers but attention work on the tokens of a process's own share. It has tokens of every scene, so that scenes are modulated
as on one process. For attention, the processes exchange tokens for heads: each computes the grouped calls of all tokens for
its share of the heads, and gives the results back. The mask is therefore exact for every variant.

Shapes: n processes, B stories, N tokens of the whole sequence, l tokens of a share (n*l >= N), H heads, D head width,
C token width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed
import torch.nn.functional as F

from mask2dit.scenes import SceneLayout

if torch.distributed.is_available():
    from torch.distributed._functional_collectives import all_to_all_single_autograd

if TYPE_CHECKING:
    from mask2dit.models.transformer import Mask2DiTTransformer3DModel


# Step caches of diffusers that decide by a process's own tokens whether to skip blocks. Where processes decide differently,
# those that do not skip wait for the others without end.
DECIDE_BY_TOKENS = ("FirstBlockCacheConfig", "SeaCacheConfig")


@dataclass(frozen=True)
class ShardedLayout(SceneLayout):
    """The layout of a process's share of the tokens. Shares have the same lengths on all processes.

    Args:
        text_lengths, video_lengths: tokens of each scene in the share, padding included.
        whole: the layout of all tokens.
        group: the processes that have a share each.
    """

    whole: SceneLayout
    group: "torch.distributed.ProcessGroup"

    def share(self, text: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes this process's share of the text and video tokens, (B, n, C) each. Padding is 0."""
        rank, size = self.group.rank(), self.group.size()
        shares = []
        for tokens, lengths, own_lengths in (
            (text, self.whole.text_lengths, self.text_lengths),
            (video, self.whole.video_lengths, self.video_lengths),
        ):
            scenes = zip(tokens.split(lengths, dim=1), own_lengths)
            shares.append(torch.cat([_divide(scene, own, size)[:, rank] for scene, own in scenes], dim=1))
        return shares[0], shares[1]

    def gather_video(self, video: torch.Tensor) -> torch.Tensor:
        """Gathers the shares of the video tokens, (B, l, C), to all of them, (B, n, C), on every process.

        The backward pass adds up the gradients of all processes. So with the same loss on each of n processes, a process's
        gradient of a weight is n times the part that comes from its tokens, and their average over the processes is the
        gradient that one process would compute. Data parallelism averages over all processes, and is right as it is.
        """
        received = _exchange(video.expand(self.group.size(), *video.shape), self.group)  # (n, B, l, C)
        return _join(received.movedim(0, 1), self.video_lengths, self.whole.video_lengths)

    def tokens_to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Exchanges all heads of a share, (B, l, H, D) each, for all tokens of this process's heads, (B, N, H/n, D) each."""
        size = self.group.size()
        by_heads = [
            tokens.unflatten(2, (size, -1)).movedim(2, 0) for tokens in (query, key, value)
        ]  # (n, B, l, H/n, D)
        received = _exchange(torch.stack(by_heads, dim=1), self.group)  # (n, 3, B, l, H/n, D)
        own = self.text_lengths + self.video_lengths
        whole = self.whole.text_lengths + self.whole.video_lengths
        query, key, value = (_join(tokens.movedim(0, 1), own, whole) for tokens in received.unbind(1))
        return query, key, value

    def heads_to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """Exchanges all tokens of this process's heads, (B, N, H/n, D), for all heads of its share, (B, l, H, D)."""
        size = self.group.size()
        own = self.text_lengths + self.video_lengths
        parts = output.split(self.whole.text_lengths + self.whole.video_lengths, dim=1)
        by_tokens = [_divide(part, length, size).movedim(1, 0) for part, length in zip(parts, own)]
        received = _exchange(torch.cat(by_tokens, dim=2), self.group)  # (n, B, l, H/n, D)
        return received.movedim(0, 2).flatten(2, 3)


@dataclass(frozen=True)
class PredictedGroup:
    """Stands in for a group of processes in passes on the meta device, which predict memory and operations."""

    num_processes: int

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.num_processes


def shard_layout(layout: SceneLayout, group: "torch.distributed.ProcessGroup") -> ShardedLayout:
    """Divides each scene's text and video over the processes of a group."""
    size = group.size()
    return ShardedLayout(
        text_lengths=tuple(-(-length // size) for length in layout.text_lengths),
        video_lengths=tuple(-(-length // size) for length in layout.video_lengths),
        whole=layout,
        group=group,
    )


def check_degree(key: str, degree: int, num_heads: int) -> None:
    """Checks that a model's heads divide over a number of processes.

    Args:
        key: the setting that names the number, for the message.

    Raises:
        ValueError: if they do not; the message names the nearest numbers that they do divide over.
    """
    if degree < 1 or num_heads % degree:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        below = [n for n in fitting if n < degree][-1:]
        above = [n for n in fitting if n > degree][:1]
        raise ValueError(
            f"{key}={degree} has to divide the {num_heads} attention heads of this model; the nearest is "
            f"{' or '.join(map(str, below + above))}"
        )


def apply_ulysses(
    transformer: "Mask2DiTTransformer3DModel", group: "torch.distributed.ProcessGroup | None", key: str = "ulysses"
) -> None:
    """Divides every forward and backward pass of a transformer over a group of processes.

    Every process of the group has to call the transformer with the same inputs, and gets the whole output.

    Args:
        transformer: a transformer with the same weights on every process.
        group: the processes; None: undo.
        key: the setting that asks for it, for messages.

    Raises:
        ValueError: if the heads do not divide over the processes, or for a step cache of `DECIDE_BY_TOKENS`.
    """
    if group is not None:
        check_degree(key, group.size(), transformer.config.num_attention_heads)
        if transformer.is_cache_enabled:
            check_step_cache(transformer._cache_config)
    transformer.ulysses_group = group


def check_step_cache(config: object) -> None:
    """Raises `ValueError` for the configuration of a step cache that cannot be used where processes share a pass."""
    name = type(config).__name__
    if name in DECIDE_BY_TOKENS:
        raise ValueError(
            f"{name} decides by the tokens of each process whether to skip blocks, so that processes that share a pass would "
            "wait for each other: use a cache that decides by the step, or divide the branches of guidance alone"
        )


def gather_branches(prediction: torch.Tensor, group: "torch.distributed.ProcessGroup") -> torch.Tensor:
    """Gathers the predictions (B, …) of guidance, one branch per process, to (2*B, …) in the order of the processes."""
    branches = [torch.empty_like(prediction) for _ in range(group.size())]
    torch.distributed.all_gather(branches, prediction.contiguous(), group=group)
    return torch.cat(branches)


def _exchange(sent: torch.Tensor, group: "torch.distributed.ProcessGroup") -> torch.Tensor:
    """Sends part i of (n, …) to process i. Returns the parts received, by sender; differentiable."""
    if sent.is_meta:
        return torch.empty_like(sent, memory_format=torch.contiguous_format)
    return all_to_all_single_autograd(sent.contiguous(), None, None, group)


def _divide(tokens: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Divides tokens (B, m, …) into shares (B, n, length, …), the last ones padded by zeros."""
    padding = size * length - tokens.shape[1]
    if padding:
        tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, padding))
    return tokens.unflatten(1, (size, length))


def _join(shares: torch.Tensor, own_lengths: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    """Joins shares (B, n, l, …), in which each scene has its own length, to tokens (B, m, …) without the padding."""
    parts = zip(shares.split(own_lengths, dim=2), lengths)
    return torch.cat([part.flatten(1, 2)[:, :length] for part, length in parts], dim=1)
