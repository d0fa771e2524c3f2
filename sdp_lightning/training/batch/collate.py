"""Collation of groups of trajectories into one batch of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdp_lightning.errors import RolloutError, VersionError
from sdp_lightning.training.batch.batch import NO_VERSION, Batch
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup


def collate(
    groups: Sequence[TrajectoryGroup],
    *,
    version: int,
    pad_token_id: int = 0,
    segment_wise: bool = True,
) -> Batch:
    """Collate groups into a batch. Rows keep the order of the groups and of their members.

    Args:
        groups: one or more; ``group_ids`` are their indices.
        version: the policy version that trains, c.
        pad_token_id: value of ``input_ids`` beyond the length of a row.
        segment_wise: read the scores of segments; False leaves every token unscored.

    Raises:
        VersionError: if a token is newer than ``version``, or a segment was scored under another
            version than the one after its own; names the group.
        RolloutError: if there is no group, a trajectory has no sampled token, its temperature was 0
            (greedy: it has no log-probs to correct with), or its rewards have other names than
            those of another; names the row.
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
    tensors: dict[str, Any] = {name: torch.from_numpy(a) for name, a in rows.arrays.items()}
    return Batch(
        version=version,
        position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
        lengths=torch.tensor([trajectory.num_tokens for _, trajectory in owned]),
        rewards=torch.tensor([t.reward for _, t in owned], dtype=torch.float32),
        **_named_rewards(owned, groups),
        group_ids=torch.tensor([index for index, _ in owned]),
        sample_ids=_sample_ids(groups),
        truncated=torch.tensor([t.finish_reason != "stop" for _, t in owned]),
        **tensors,
    )


def _sample_ids(groups: Sequence[TrajectoryGroup]) -> torch.Tensor | None:
    """[B] of each trajectory's sample; None if each is one."""
    if all(t.sample is None for group in groups for t in group.trajectories):
        return None
    ids: list[int] = []
    for group in groups:
        start, own = max(ids, default=-1) + 1, [0] * len(group.trajectories)
        for number, members in enumerate(group.samples):
            for member in members:
                own[member] = start + number
        ids += own
    return torch.tensor(ids)


def _named_rewards(
    owned: Sequence[tuple[int, Trajectory]], groups: Sequence[TrajectoryGroup]
) -> dict[str, Any]:
    """The fields of a batch about rewards with names."""
    names = tuple(sorted(owned[0][1].rewards))
    for index, trajectory in owned:
        if sorted(trajectory.rewards) != list(names):
            raise RolloutError(
                f"a trajectory of row {groups[index].row_id!r} has rewards named "
                f"{sorted(trajectory.rewards)}, and one of row {groups[0].row_id!r} {list(names)}; "
                "the names must be the same for all rows. After a resume with other rewards, name "
                "them by rewards={...}: groups of the checkpoint that have others then begin anew."
            )
    if not names:
        return {}
    values = [[t.rewards[name] for name in names] for _, t in owned]
    weights = [[t.reward_weights[name] for name in names] for _, t in owned]
    return {
        "reward_names": names,
        "named_rewards": torch.tensor(values, dtype=torch.float32),
        "reward_weights": torch.tensor(weights, dtype=torch.float32),
    }


def blank_batch(version: int, reward_names: Sequence[str] = ()) -> Batch:
    """A batch of one row without a token to train, for a rank that has no group left.

    Args:
        version: the policy version that trains.
        reward_names: names of the rewards of other ranks.
    """
    blank = Trajectory((Context([0]), Segment(version, [0], [0.0])))
    zeros = dict.fromkeys(reward_names, 0.0)
    group = TrajectoryGroup((blank.with_rewards(zeros, zeros),))
    return replace(collate([group], version=version).idle(), is_blank=True)


def trial_batch(vocab_size: int, length: int = 20) -> Batch:
    """Rows of unlike length, to try a model on: a long and a short one after a prefix, and a copy.

    The copy, row 2, is the short row after another prefix. Both prefixes end with the same token,
    so that only attention makes a difference. The first five sampled tokens of the long row and the
    short one are the same, so they differ only if what follows is seen. Of each row at most 13
    tokens are scored, the last ones among them.

    Args:
        vocab_size: token ids are below half of it: some models cut off the logits of the last ones.
        length: tokens of the long row, 18 or more.
    """

    def tokens(*numbers: int) -> list[int]:
        return [(7919 * number + 1) % max(vocab_size // 2, 1) for number in numbers]

    def segment(*numbers: int) -> Segment:
        return Segment(0, tokens(*numbers), [-1.0] * len(numbers))

    first, other = Context(tokens(0, 1, 2, 3)), Context(tokens(4, 5, 6, 3))
    start, middle = segment(*range(7, 12)), Context(tokens(*range(20, 20 + length - 17)))
    end, short = segment(*range(12, 20)), segment(*range(7, 15))
    rows = [(first, start, middle, end), (first, short), (other, short)]
    long, *shorts = (Trajectory(row) for row in rows)
    return collate([TrajectoryGroup((long, shorts[0])), TrajectoryGroup((shorts[1],))], version=0)


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
            cells = row, slice(start, start + part.token_ids.size)
            self.arrays["input_ids"][cells] = part.token_ids
            start += part.token_ids.size
            if not isinstance(part, Segment):
                continue
            score = part.proximal.logprobs if segment_wise else None
            self.arrays["loss_mask"][cells] = True
            self.arrays["versions"][cells] = part.version
            self.arrays["behavior_logprobs"][cells] = part.logprobs
            self.arrays["segment_logprobs"][cells] = np.nan if score is None else score
            self.arrays["segment_scored"][cells] = score is not None
            self.arrays["temperatures"][cells] = part.temperature


def _check(trajectory: Trajectory, group: TrajectoryGroup, version: int) -> None:
    name = f"group of row {group.row_id!r} (order {group.order})"
    if not trajectory.segments:
        raise RolloutError(f"{name} has a trajectory without sampled tokens: nothing to train on.")
    for segment in trajectory.segments:
        if segment.version > version:
            raise VersionError(
                f"{name} has tokens of version {segment.version}, but the trainer is at {version}."
            )
        if not 0 < segment.temperature < math.inf:
            raise RolloutError(
                f"{name} was sampled at temperature {segment.temperature}: greedy tokens have no "
                "log-probs to train with. Sample at a positive, finite temperature."
            )
        scorer = segment.proximal.version
        if scorer is not None and scorer != segment.version + 1:
            raise VersionError(
                f"{name} has a segment of version {segment.version} scored under {scorer}; its "
                f"segment proximal policy is version {segment.version + 1}."
            )
