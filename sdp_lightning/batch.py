"""From groups of trajectories to tensors, and how to cut those into pieces that fit.

Shapes: B trajectories (rows), T tokens, padded on the right. Everything is aligned on the token
that it scores: ``behavior_logprobs[i, t]`` is the log-prob of ``input_ids[i, t]`` given the tokens
before it, so index 0 is never trained on and nothing is ever shifted again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdp_lightning.errors import ConfigError, RolloutError, VersionError
from sdp_lightning.types import Segment, Trajectory, TrajectoryGroup

Layout = Literal["padded", "shared_prefix"]
NO_VERSION = -1  # of tokens that the policy did not choose


@dataclass(frozen=True, eq=False)
class Batch:
    """What one training step, or a piece of it, sees. Log-probs in nats.

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
        rewards: [B] float32.
        group_ids: [B] int64, equal among siblings.
        truncated: [B] bool, sampling did not end by itself.
        advantages: [B, T] float32, None until the module sets it.
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
        _, group, first = _group_index(self.group_ids)
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

    def idle(self) -> Batch:
        """One row with nothing to learn: what a rank computes while others have more to do."""
        row = self.select([0])
        return dataclasses.replace(row, loss_mask=torch.zeros_like(row.loss_mask))

    def microbatches(self, max_tokens: int, layout: Layout) -> list[list[int]]:
        """Rows in pieces of at most ``max_tokens`` computed tokens: :func:`plan_microbatches`."""
        lengths: list[int] = self.scored_lengths.tolist()
        if layout == "padded":
            return plan_microbatches(lengths, max_tokens)
        prefixes: list[int] = self.prefix_lengths.tolist()
        groups: list[int] = self.group_ids.tolist()
        return plan_microbatches(lengths, max_tokens, group_ids=groups, prefix_lengths=prefixes)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: function(v) for name, v in fields.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


class SealedBatch:
    """A batch in an envelope that moves whole.

    Lightning's half-precision plugins round every float tensor of a batch that they can look into,
    log-probs and advantages too, and refuse frozen dataclasses. They look into dataclasses, dicts
    and sequences, and move whatever has a ``to``; this has nothing else.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> SealedBatch:
        """The same envelope around the batch on another device."""
        return SealedBatch(self.batch.to(device, non_blocking=non_blocking))


def collate(
    groups: Sequence[TrajectoryGroup],
    *,
    version: int,
    pad_token_id: int = 0,
    segment_wise: bool = True,
) -> Batch:
    """Put groups into tensors. Rows keep the order of the groups and of their members.

    Args:
        groups: one or more; ``group_ids`` are their places.
        version: the policy version that trains, c.
        pad_token_id: what ``input_ids`` holds beyond the length of a row.
        segment_wise: read the scores of segments; False leaves every token unscored.

    Raises:
        VersionError: if a token is newer than ``version``, or a segment was scored under another
            version than the one after its own; names the group.
        RolloutError: if there is no group, a trajectory has no sampled token, or its temperature
            was 0 (greedy: it has no log-probs to correct with).
    """
    if not groups:
        raise RolloutError("collate needs at least one group.")
    owned = [(index, t) for index, group in enumerate(groups) for t in group.trajectories]
    for index, trajectory in owned:
        _check(trajectory, groups[index], version)
    shape = len(owned), max(trajectory.num_tokens for _, trajectory in owned)
    rows = _Rows(shape, pad_token_id)
    for row, (_, trajectory) in enumerate(owned):
        rows.write(row, trajectory, segment_wise)
    return Batch(
        version=version,
        position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
        lengths=torch.tensor([trajectory.num_tokens for _, trajectory in owned]),
        rewards=torch.tensor([t.reward for _, t in owned], dtype=torch.float32),
        group_ids=torch.tensor([index for index, _ in owned]),
        truncated=torch.tensor([t.finish_reason != "stop" for _, t in owned]),
        **{name: torch.from_numpy(array) for name, array in rows.arrays.items()},
    )


class _Rows:
    """The [B, T] arrays of a batch while they are written, row by row."""

    def __init__(self, shape: tuple[int, int], pad_token_id: int) -> None:
        self.arrays: dict[str, NDArray[Any]] = {
            "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
            "loss_mask": np.zeros(shape, dtype=np.bool_),
            "versions": np.full(shape, NO_VERSION, dtype=np.int64),
            "behavior_logprobs": np.zeros(shape, dtype=np.float32),
            "segment_logprobs": np.zeros(shape, dtype=np.float32),
            "segment_scored": np.zeros(shape, dtype=np.bool_),
            "temperatures": np.ones(shape, dtype=np.float32),
        }

    def write(self, row: int, trajectory: Trajectory, segment_wise: bool) -> None:
        start = 0
        for part in trajectory.parts:
            place = row, slice(start, start + part.token_ids.size)
            self.arrays["input_ids"][place] = part.token_ids
            start += part.token_ids.size
            if not isinstance(part, Segment):
                continue
            score = part.proximal.logprobs if segment_wise else None
            self.arrays["loss_mask"][place] = True
            self.arrays["versions"][place] = part.version
            self.arrays["behavior_logprobs"][place] = part.logprobs
            self.arrays["segment_logprobs"][place] = np.nan if score is None else score
            self.arrays["segment_scored"][place] = score is not None
            self.arrays["temperatures"][place] = part.temperature


def _check(trajectory: Trajectory, group: TrajectoryGroup, version: int) -> None:
    name = f"group of row {group.row_id!r} (order {group.order})"
    if not trajectory.segments:
        raise RolloutError(f"{name} has a trajectory without sampled tokens: nothing to train on.")
    for segment in trajectory.segments:
        if segment.version > version:
            raise VersionError(
                f"{name} has tokens of version {segment.version}, but the trainer is at {version}."
            )
        if not segment.temperature > 0:
            raise RolloutError(
                f"{name} was sampled at temperature {segment.temperature}: greedy tokens have no "
                "log-probs to train with. Sample at a positive temperature."
            )
        scorer = segment.proximal.version
        if scorer is not None and scorer != segment.version + 1:
            raise VersionError(
                f"{name} has a segment of version {segment.version} scored under {scorer}; its "
                f"segment proximal policy is version {segment.version + 1}."
            )


def plan_microbatches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    group_ids: Sequence[int] | None = None,
    prefix_lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Cut rows into as few micro-batches as a budget of computed tokens allows, evenly.

    Without groups the cost of a micro-batch is rows times its longest row, and rows of like length
    go together. With groups it is the sum of lengths with the prefix of a group counted once, and a
    group stays whole if it fits. A row that is longer than the budget has one of its own.

    Args:
        lengths: tokens of each row.
        max_tokens: the budget.
        group_ids: of each row.
        prefix_lengths: leading tokens of each row that its group shares.

    Returns:
        Lists of row indices that cover every row once. The same input gives the same lists.

    Raises:
        ConfigError: if ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}.")
    if group_ids is None or prefix_lengths is None:
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        units = [[row] for row in order]

        def cost(rows: list[int]) -> int:
            return len(rows) * max(lengths[row] for row in rows)

    else:

        def cost(rows: list[int]) -> int:
            prefixes = {group_ids[row]: prefix_lengths[row] for row in rows}
            own = sum(lengths[row] - prefix_lengths[row] for row in rows)
            return own + sum(prefixes.values())

        members: dict[int, list[int]] = {}
        for row, group in enumerate(group_ids):
            members.setdefault(group, []).append(row)
        units = [
            unit
            for rows in members.values()
            for unit in _pack_evenly([[row] for row in rows], cost, max_tokens)
        ]
    return _pack_evenly(units, cost, max_tokens)


def split_minibatches(
    group_ids: Tensor | Sequence[int],
    num_minibatches: int,
    *,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Deal groups out to minibatches, whole, so that their numbers of groups differ by at most 1.

    Args:
        group_ids: [B] of each row.
        num_minibatches: how many.
        generator: shuffles the groups; None keeps their order.

    Returns:
        Lists of row indices that cover every row once.

    Raises:
        ConfigError: if there are fewer groups than minibatches.
    """
    ids: list[int] = torch.as_tensor(group_ids).tolist()
    groups = list(dict.fromkeys(ids))
    if not 1 <= num_minibatches <= len(groups):
        raise ConfigError(
            f"{len(groups)} groups cannot fill {num_minibatches} minibatches: groups stay whole. "
            "Use fewer minibatches or a larger batch_size."
        )
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    home = {group: i * num_minibatches // len(groups) for i, group in enumerate(groups)}
    minibatches: list[list[int]] = [[] for _ in range(num_minibatches)]
    for row, group in enumerate(ids):
        minibatches[home[group]].append(row)
    return minibatches


def _pack_evenly(
    units: list[list[int]], cost: Callable[[list[int]], int], budget: int
) -> list[list[int]]:
    """Runs of neighboring units within the budget: as few as greedy filling needs, then level.

    Leveling searches for the smallest budget that still needs no more runs.
    """
    packed = _fill(units, cost, budget)
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        trial = _fill(units, cost, middle)
        if len(trial) <= len(packed):
            packed, high = trial, middle
        else:
            low = middle + 1
    return packed


def _fill(
    units: Iterable[list[int]], cost: Callable[[list[int]], int], budget: int
) -> list[list[int]]:
    runs: list[list[int]] = []
    for unit in units:
        if runs and cost(runs[-1] + unit) <= budget:
            runs[-1] = runs[-1] + unit
        else:
            runs.append(list(unit))
    return runs


def _group_index(group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [G], the place of each row's id [B], the first row of each group [G]."""
    ids, group = torch.unique(group_ids, return_inverse=True)
    rows = torch.arange(group_ids.numel(), device=group_ids.device)
    first = torch.full_like(ids, group_ids.numel()).scatter_reduce(0, group, rows, "amin")
    return ids, group, first
