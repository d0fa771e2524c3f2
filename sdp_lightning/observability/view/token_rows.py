"""Rows of tokens with their numbers, made from trajectories, groups and batches.

An unknown number is NaN. Log-probs in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.objective.trust_region import centre_and_log_weight
from sdp_lightning.observability.view.branches import Branch, branches_of
from sdp_lightning.observability.view.text import visible
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import row_advantages, segment_policy
from sdp_lightning.types import Segment, Trajectory, TrajectoryGroup

Viewable: TypeAlias = Trajectory | TrajectoryGroup | Batch | Sequence[TrajectoryGroup]
Numbers: TypeAlias = NDArray[np.float32]

CONTEXT = -1  # the version of tokens that the policy did not choose
NAMES = ("behavior", "segment", "proximal", "weight")


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One trajectory.

    Args:
        token_ids: [T] int64.
        versions: [T] int64, :data:`CONTEXT` for tokens that the policy did not choose.
        numbers: [T] each, by the :data:`NAMES`: log-probs b, q and x, and the behavior weight w.
        reward: reward of the trajectory.
        rewards: several rewards by name, unweighted.
        advantage: NaN if unknown.
        version: policy version c that trains on it; None if unknown.
        note: why it ended.
        branch: where it leaves the others of its sample; None: there are none.
    """

    token_ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    numbers: Mapping[str, Numbers]
    reward: float
    advantage: float = float("nan")
    version: int | None = None
    note: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    branch: Branch | None = None

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @property
    def num_shared(self) -> int:
        """Leading tokens that another row shows."""
        return 0 if self.branch is None else self.branch.shared

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[T] bool: tokens that the policy chose."""
        return self.versions != CONTEXT

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(version, start, end) of each run of tokens of one version, contexts included."""
        edges = np.flatnonzero(np.diff(self.versions)) + 1
        bounds = [0, *edges.tolist(), len(self)]
        return [
            (int(self.versions[start]), start, end)
            for start, end in pairwise(bounds)
            if end > start
        ]


@dataclass(frozen=True)
class Section:
    """The rows of one prompt, under a title."""

    title: str
    rows: tuple[TokenRow, ...]


def sections_of(
    data: Viewable,
    *,
    version: int | None,
    loss: LossConfig,
    update: UpdateConfig | None,
    most_rows: int,
) -> tuple[list[Section], int]:
    """Sections to draw, and the number of trajectories that they leave out.

    Args:
        data: a trajectory, a group, groups, or a batch.
        version: policy version that trains on it, for lags; a batch has its own.
        loss: defines the weights.
        update: defines the advantages of a group's members; None leaves them unknown.
        most_rows: trajectories to show at most.
    """
    if isinstance(data, Batch):
        return _of_batch(data, loss, most_rows)
    if isinstance(data, Trajectory):
        return [Section("", (_of_trajectory(data, version, loss),))], 0
    groups = [data] if isinstance(data, TrajectoryGroup) else list(data)
    sections: list[Section] = []
    left = most_rows
    for group in groups:
        if left <= 0:
            break
        rows = [_of_trajectory(t, version, loss) for t in group.trajectories[:left]]
        members = [[i for i in each if i < len(rows)] for each in group.samples]
        rows = _with_branches(rows, members)
        pairs = zip(rows, _group_advantages(group, loss, update), strict=False)
        shown = tuple(replace(row, advantage=advantage) for row, advantage in pairs)
        sections.append(Section(_title(group), shown))
        left -= len(rows)
    total = sum(len(group.trajectories) for group in groups)
    return sections, total - sum(len(section.rows) for section in sections)


def _with_branches(rows: list[TokenRow], samples: Sequence[Sequence[int]]) -> list[TokenRow]:
    """The rows, of which those of one sample know where they leave each other."""
    found = list(rows)
    for members in samples:
        tokens = [rows[index].token_ids for index in members]
        branches = branches_of(tokens, [int(rows[index].sampled.argmax()) for index in members])
        for index, branch in zip(members, branches, strict=True):
            found[index] = replace(rows[index], branch=branch)
    return found


def advantage_note(data: Viewable, *, loss: LossConfig, update: UpdateConfig | None) -> str:
    """Says why the advantages of ``data`` are not shown; empty if they are, or if it has none."""
    if isinstance(data, Batch | Trajectory):
        return ""
    groups = [data] if isinstance(data, TrajectoryGroup) else data
    if all(len(group.trajectories) < 2 for group in groups):
        return ""
    if update is not None and update.advantages == "gdpo":
        return "advantages not shown: GDPO normalizes them over the batch, which a group lacks"
    if _takes_kl_off_reward(loss):
        return "advantages not shown: this loss takes a KL off the reward, which a group lacks"
    return (
        "" if update is not None else "advantages not shown: pass update=, the run's UpdateConfig"
    )


def _takes_kl_off_reward(loss: LossConfig) -> bool:
    return loss.needs_reference and loss.kl_in == "reward"


def _group_advantages(
    group: TrajectoryGroup, loss: LossConfig, update: UpdateConfig | None
) -> list[float]:
    """Advantages of a group's members; NaN where they are unknown, and for a single member.

    A KL in the reward needs log-probs of the reference policy, which a group does not have, and
    GDPO its batch.
    """
    own = [t.reward for t in group.trajectories]
    samples = group.samples
    rewards = torch.tensor(
        [sum(own[i] for i in each) / len(each) for each in samples], dtype=torch.float64
    )
    if (
        update is None
        or len(rewards) < 2
        or _takes_kl_off_reward(loss)
        or update.advantages == "gdpo"
    ):
        return [float("nan")] * len(own)
    found = row_advantages(rewards, torch.zeros(len(rewards)), update).tolist()
    of = {member: value for each, value in zip(samples, found, strict=True) for member in each}
    return [of[member] for member in range(len(own))]


def _title(group: TrajectoryGroup) -> str:
    count = len(group.samples)
    title = f"row {visible(group.row_id)}" if group.row_id else "group"
    return f"{title}, {count} sample{'s' * (count != 1)}, mean reward {group.reward:.3g}"


def _of_trajectory(trajectory: Trajectory, version: int | None, loss: LossConfig) -> TokenRow:
    behavior, segment = [
        np.concatenate(
            [
                logprobs(part) if isinstance(part, Segment) else _unknown(part.token_ids.size)
                for part in trajectory.parts
            ]
        )
        for logprobs in (_behavior, _score)
    ]
    versions = np.concatenate(
        [
            np.full(part.token_ids.size, part.version if isinstance(part, Segment) else CONTEXT)
            for part in trajectory.parts
        ]
    )
    numbers = {"behavior": behavior, "segment": segment, "proximal": _unknown(behavior.size)}
    lags = np.zeros_like(versions) if version is None else version - versions
    return TokenRow(
        token_ids=trajectory.token_ids,
        versions=versions,
        numbers=numbers | {"weight": _weights(numbers, lags, loss)},
        reward=trajectory.reward,
        rewards=trajectory.rewards,
        version=version,
        note=trajectory.finish_reason,
    )


def _behavior(segment: Segment) -> Numbers:
    return segment.logprobs


def _score(segment: Segment) -> Numbers:
    score = segment.proximal.logprobs
    return _unknown(len(segment)) if score is None else score


def _weights(numbers: Mapping[str, Numbers], lags: NDArray[np.int64], loss: LossConfig) -> Numbers:
    """Behavior weights w, NaN where a log-prob that the estimator reads is unknown."""
    x, q, b = (torch.from_numpy(numbers[name]) for name in ("proximal", "segment", "behavior"))
    log_weight = centre_and_log_weight(x, q, b, loss, torch.from_numpy(lags))[1]
    return torch.where(b.isnan(), b, log_weight.exp()).numpy()


def _unknown(size: int | tuple[int, ...]) -> Numbers:
    return np.full(size, np.nan, dtype=np.float32)


def _of_batch(batch: Batch, loss: LossConfig, most_rows: int) -> tuple[list[Section], int]:
    total, batch = len(batch), batch.select(range(min(len(batch), most_rows))).to("cpu")
    numbers = _numbers_of(batch, loss)
    rows: list[TokenRow] = []
    for index, length in enumerate(batch.lengths.tolist()):
        mask = batch.loss_mask[index, :length].numpy()
        advantage = float("nan")
        if batch.advantages is not None and mask.any():
            advantage = float(batch.advantages[index, :length][batch.loss_mask[index, :length]][0])
        row = TokenRow(
            token_ids=batch.input_ids[index, :length].numpy(),
            versions=np.where(mask, batch.versions[index, :length].numpy(), CONTEXT),
            numbers={name: values[index, :length] for name, values in numbers.items()},
            reward=float(batch.rewards[index]),
            advantage=advantage,
            version=batch.version,
            note="truncated" if bool(batch.truncated[index]) else "stop",
            rewards={}
            if batch.named_rewards is None
            else dict(zip(batch.reward_names, batch.named_rewards[index].tolist(), strict=True)),
        )
        rows.append(row)
    if batch.sample_ids is not None:
        samples: dict[int, list[int]] = {}
        for index, sample in enumerate(batch.sample_ids.tolist()):
            samples.setdefault(sample, []).append(index)
        rows = _with_branches(rows, list(samples.values()))
    sections: dict[int, list[TokenRow]] = {}
    for row, group in zip(rows, batch.group_ids.tolist(), strict=True):
        sections.setdefault(group, []).append(row)
    titled = [Section(f"group {group}", tuple(rows)) for group, rows in sections.items()]
    return titled, total - len(batch)


def _numbers_of(batch: Batch, loss: LossConfig) -> dict[str, Numbers]:
    """b, q, x and w, each [B, T]."""
    mask, old = batch.loss_mask.numpy(), (batch.lags >= 2).numpy()

    def where(known: NDArray[np.bool_], values: NDArray[np.float32]) -> Numbers:
        return np.where(known & mask, values, np.nan).astype(np.float32)

    x, behavior = batch.proximal_logprobs, batch.behavior_logprobs.numpy()
    if x is None:
        scored = batch.segment_scored.numpy() & old
        segment, proximal = where(scored, batch.segment_logprobs.numpy()), _unknown(mask.shape)
    else:
        segment = where(mask, segment_policy(x, batch, loss).numpy())
        proximal = where(mask, x.numpy())
    numbers = {"behavior": where(mask, behavior), "segment": segment, "proximal": proximal}
    return numbers | {"weight": _weights(numbers, batch.lags.numpy(), loss)}
