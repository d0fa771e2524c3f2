"""The tensors of a training step.

Shapes: B trajectories (rows), T tokens, padded on the right. Everything is aligned on the token
that it scores: ``behavior_logprobs[i, t]`` is the log-prob of ``input_ids[i, t]`` given the tokens
before it, so index 0 is never trained on and nothing is ever shifted again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdp_lightning.config import MissingProximal
from sdp_lightning.training.batch.microbatches import (
    FREE,
    AttentionCosts,
    pack_microbatches,
    pad_microbatches,
    share_microbatches,
    shared_spans,
)
from sdp_lightning.types import Displayed

Layout = Literal["padded", "packed", "shared_prefix"]
NO_VERSION = -1  # of tokens that the policy did not choose


@dataclass(frozen=True, eq=False)
class Batch(Displayed):
    """Tensors of one training step, or of a piece of it. Log-probs in nats.

    Args:
        version: the policy version that trains, c.
        input_ids: [B, T] int64.
        position_ids: [B, T] int64.
        lengths: [B] int64, tokens of a row without its padding.
        loss_mask: [B, T] bool, tokens that the policy chose.
        versions: [B, T] int64, of the policy that sampled; -1 outside the loss mask.
        behavior_logprobs: [B, T] float32, 0 outside the loss mask.
        segment_logprobs: [B, T] float32; NaN where the loss mask holds and there is no score, so
            that a token which nobody completed cannot pass for one of probability 1.
        segment_scored: [B, T] bool.
        temperatures: [B, T] float32, of the distribution sampled from; 1 outside the loss mask.
        rewards: [B] float32; of several, their weighted sum.
        group_ids: [B] int64, equal among siblings.
        truncated: [B] bool, sampling did not end by itself.
        advantages: [B, T] float32, None until the module sets it.
        proximal_logprobs: [B, T] float32, None where the module takes them from its own pass.
        reference_logprobs: [B, T] float32, None without a reference policy.
        rejected: [B, T] bool, tokens that the whole step's second moment rejects; None is no token.
        named_rewards: [B, K] float32, several rewards in the order of ``reward_names``.
        reward_weights: [B, K] float32, weight of each in the sum.
        reward_names: K names in alphabetical order; empty, as the two tensors are None, if there is
            one reward.
        missing_proximal: substitute for the score of an unscored token of lag 2 or more.
        max_lag: tokens older than this get weight 0, and still count in N; None is no bound.
        most_groups: the most groups that a rank has, of which there may be fewer than minibatches;
            None is at least as many as those.
        sample_ids: [B] int64, equal among the rows of one sample; None: each row is a sample.
        sample_tokens: [B] int64, tokens of the loss mask of the row's sample in the whole optimizer
            step; None: those of the row.
        is_blank: whether the rank has no group, and its one row is there for the others' sake.
    """

    version: int
    input_ids: Tensor
    position_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor
    versions: Tensor
    behavior_logprobs: Tensor
    segment_logprobs: Tensor
    segment_scored: Tensor
    temperatures: Tensor
    rewards: Tensor
    group_ids: Tensor
    truncated: Tensor
    advantages: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    rejected: Tensor | None = None
    named_rewards: Tensor | None = None
    reward_weights: Tensor | None = None
    reward_names: tuple[str, ...] = ()
    missing_proximal: MissingProximal = "behavior"
    max_lag: int | None = None
    most_groups: int | None = None
    sample_ids: Tensor | None = None
    sample_tokens: Tensor | None = None
    is_blank: bool = False

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lags(self) -> Tensor:
        """[B, T] int64, versions between sampling and training; 0 outside the loss mask."""
        return torch.where(self.loss_mask, self.version - self.versions, 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the loss mask."""
        return int(self.loss_mask.sum())

    @property
    def scored_lengths(self) -> Tensor:
        """[B] int64, leading tokens that must be computed to score the last sampled one."""
        index = torch.arange(self.input_ids.shape[1], device=self.loss_mask.device)
        return torch.where(self.loss_mask, index, 0).amax(1)

    @property
    def prefix_lengths(self) -> Tensor:
        """[B] int64, leading tokens that all rows of the group share before they sample.

        A row without loss tokens has nothing to compute and does not count.
        """
        _, group, first = index_of_groups(self.group_ids)
        same = self.input_ids == self.input_ids[first[group]]
        before = self.loss_mask.cumsum(1) == 0
        shared = (same & before).long().cumprod(1).sum(1)
        longest = self.input_ids.shape[1]
        shared = torch.where(self.loss_mask.any(1), shared, longest)
        least = torch.full_like(first, longest).scatter_reduce(0, group, shared, "amin")
        return torch.where(self.loss_mask.any(1), least[group], 0)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def select(self, rows: Sequence[int]) -> Batch:
        """Some rows, in the order asked for, padded as before."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.input_ids.device)
        return self._each(lambda tensor: tensor[index])

    def without_truncated(self) -> Batch:
        """The same rows; of those whose sampling did not end by itself no token is trained on."""
        mask = self.loss_mask & ~self.truncated[:, None]
        return dataclasses.replace(self, loss_mask=mask)

    def idle(self) -> Batch:
        """One row without a token to train: computed while other ranks have more micro-batches."""
        row = self.select([0])
        return dataclasses.replace(row, loss_mask=torch.zeros_like(row.loss_mask))

    def microbatches(
        self, max_tokens: int, layout: Layout, costs: AttentionCosts = FREE
    ) -> list[list[int]]:
        """Rows in pieces of at most ``max_tokens`` computed tokens, level by what they cost."""
        lengths: list[int] = self.scored_lengths.tolist()
        if layout == "padded":
            return pad_microbatches(lengths, max_tokens, costs)
        if layout == "packed":
            return pack_microbatches(lengths, max_tokens, costs)
        prefixes: list[int] = self.prefix_lengths.tolist()
        groups: list[int] = self.group_ids.tolist()
        return share_microbatches(lengths, prefixes, groups, max_tokens, costs)

    def cost(self, max_tokens: int, layout: Layout, costs: AttentionCosts) -> float:
        """Cost of a pass over all micro-batches, in tokens through the linear layers."""
        pieces = self.microbatches(max_tokens, layout, costs)
        lengths: list[int] = self.scored_lengths.tolist()
        if layout == "padded":
            return sum(costs.padded([lengths[row] for row in rows]) for rows in pieces)
        if layout == "packed":
            return sum(costs.packed([lengths[row] for row in rows]) for rows in pieces)
        prefixes: list[int] = self.prefix_lengths.tolist()
        groups: list[int] = self.group_ids.tolist()
        return sum(costs.packed(shared_spans(rows, lengths, prefixes, groups)) for rows in pieces)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: function(v) for name, v in fields.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


class SealedBatch:
    """Wrapper that moves a batch between devices unchanged.

    Lightning's half-precision plugins round every float tensor of a batch that they can look into,
    log-probs and advantages too, and refuse frozen dataclasses. They look into dataclasses, dicts
    and sequences, and move whatever has a ``to``; this has nothing else.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> SealedBatch:
        """The same wrapper around the batch on another device."""
        return SealedBatch(self.batch.to(device, non_blocking=non_blocking))


def index_of_groups(group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [G], the index of each row's id [B], the first row of each group [G]."""
    ids, group = torch.unique(group_ids, return_inverse=True)
    rows = torch.arange(group_ids.numel(), device=group_ids.device)
    first = torch.full_like(ids, group_ids.numel()).scatter_reduce(0, group, rows, "amin")
    return ids, group, first
