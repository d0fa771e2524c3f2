"""From trajectories, groups and batches to rows of tokens, ready to be drawn.

A number that is not known is NaN. Log-probs in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdp_lightning.config import LossConfig
from sdp_lightning.training.batch import Batch
from sdp_lightning.types import Segment, Trajectory, TrajectoryGroup

Viewable: TypeAlias = Trajectory | TrajectoryGroup | Batch | Sequence[TrajectoryGroup]
Numbers: TypeAlias = NDArray[np.float32]

CONTEXT = -1  # the version of tokens that the policy did not choose
NAMES = ("behavior", "segment", "proximal", "weight")


@dataclass(frozen=True, eq=False)
class Row:
    """One trajectory.

    Args:
        token_ids: [T] int64.
        versions: [T] int64, :data:`CONTEXT` where the policy did not choose.
        numbers: by the :data:`NAMES`, each [T]: log-probs b, q and x, and the behavior weight w.
        reward: of the whole row.
        advantage: NaN if nobody has said.
        version: that trains on it, c; None if nobody has said.
        note: how it ended, for example.
    """

    token_ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    numbers: Mapping[str, Numbers]
    reward: float
    advantage: float = float("nan")
    version: int | None = None
    note: str = ""

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[T] which tokens the policy chose."""
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
    """The rows of one prompt, and what to call them."""

    title: str
    rows: tuple[Row, ...]


def sections_of(
    data: Viewable, *, version: int | None, loss: LossConfig, most_rows: int
) -> tuple[list[Section], int]:
    """What there is to draw of ``data``, and how many trajectories are left out.

    Args:
        data: a trajectory, a group, groups, or a batch.
        version: the policy version that trains on it, of which lags are counted; a batch knows it.
        loss: says what a weight is.
        most_rows: trajectories to show.
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
        advantages = group_advantages([t.reward for t in group.trajectories])
        pairs = zip(rows, advantages, strict=False)
        shown = tuple(replace(row, advantage=advantage) for row, advantage in pairs)
        sections.append(Section(_title(group), shown))
        left -= len(rows)
    total = sum(len(group.trajectories) for group in groups)
    return sections, total - sum(len(section.rows) for section in sections)


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """What GRPO makes of a group's rewards; NaN for a single one, which has nothing to beat."""
    if len(rewards) < 2:
        return [float("nan")] * len(rewards)
    deviation = np.array(rewards, dtype=np.float64) - np.mean(rewards)
    return (deviation / (np.std(rewards) + 1e-6)).tolist()


def _title(group: TrajectoryGroup) -> str:
    count = len(group.trajectories)
    title = f"row {group.row_id}" if group.row_id else "group"
    return f"{title}, {count} sample{'s' * (count != 1)}, mean reward {group.reward:.3g}"


def _of_trajectory(trajectory: Trajectory, version: int | None, loss: LossConfig) -> Row:
    behavior, segment = [
        np.concatenate(
            [
                logprobs(part) if isinstance(part, Segment) else _unknown(part.token_ids.size)
                for part in trajectory.parts
            ]
        )
        for logprobs in (_behavior, _score)
    ]
    numbers = {"behavior": behavior, "segment": segment, "proximal": _unknown(behavior.size)}
    return Row(
        token_ids=trajectory.token_ids,
        versions=np.concatenate(
            [
                np.full(part.token_ids.size, part.version if isinstance(part, Segment) else CONTEXT)
                for part in trajectory.parts
            ]
        ),
        numbers=numbers | {"weight": _known_weight(numbers, loss)},
        reward=trajectory.reward,
        version=version,
        note=trajectory.finish_reason,
    )


def _behavior(segment: Segment) -> Numbers:
    return segment.logprobs


def _score(segment: Segment) -> Numbers:
    score = segment.proximal.logprobs
    return _unknown(len(segment)) if score is None else score


def _known_weight(numbers: Mapping[str, Numbers], loss: LossConfig) -> Numbers:
    """Weights without the proximal policy: 1 around b, exp(q - b) around q, else unknown."""
    behavior = numbers["behavior"]
    if loss.trust_region == "behavior":
        return np.where(np.isnan(behavior), np.nan, 1.0).astype(np.float32)
    if loss.trust_region in ("segment", "past"):
        return np.exp(numbers["segment"] - behavior)
    return np.full_like(behavior, np.nan)


def _unknown(size: int) -> Numbers:
    return np.full(size, np.nan, dtype=np.float32)


def _of_batch(batch: Batch, loss: LossConfig, most_rows: int) -> tuple[list[Section], int]:
    total, batch = len(batch), batch.select(range(min(len(batch), most_rows))).to("cpu")
    numbers = _numbers_of(batch, loss)
    sections: dict[int, list[Row]] = {}
    for index, length in enumerate(batch.lengths.tolist()):
        mask = batch.loss_mask[index, :length].numpy()
        advantage = float("nan")
        if batch.advantages is not None and mask.any():
            advantage = float(batch.advantages[index, :length][batch.loss_mask[index, :length]][0])
        row = Row(
            token_ids=batch.input_ids[index, :length].numpy(),
            versions=np.where(mask, batch.versions[index, :length].numpy(), CONTEXT),
            numbers={name: values[index, :length] for name, values in numbers.items()},
            reward=float(batch.rewards[index]),
            advantage=advantage,
            version=batch.version,
            note="truncated" if bool(batch.truncated[index]) else "stop",
        )
        sections.setdefault(int(batch.group_ids[index]), []).append(row)
    found = [Section(f"group {group}", tuple(rows)) for group, rows in sections.items()]
    return found, total - len(batch)


def _numbers_of(batch: Batch, loss: LossConfig) -> dict[str, Numbers]:
    """b, q, x and w, each [B, T]."""
    from sdp_lightning.objective.trust_region import centre_and_log_weight
    from sdp_lightning.training.loss import segment_centre, segment_policy

    mask, old = batch.loss_mask.numpy(), (batch.lags >= 2).numpy()

    def where(known: NDArray[np.bool_], values: NDArray[np.float32]) -> Numbers:
        return np.where(known & mask, values, np.nan).astype(np.float32)

    b, x = batch.behavior_logprobs, batch.proximal_logprobs
    behavior = where(mask, b.numpy())
    if x is None:
        known = batch.segment_scored.numpy() & old
        numbers = {"behavior": behavior, "segment": where(known, batch.segment_logprobs.numpy())}
        numbers["proximal"] = where(np.zeros_like(mask), behavior)
        return numbers | {"weight": _known_weight(numbers, loss)}
    q = segment_policy(x, batch, loss)
    log_weight = centre_and_log_weight(x, segment_centre(q, batch, loss), b, loss)[1]
    return {
        "behavior": behavior,
        "segment": where(mask, q.numpy()),
        "proximal": where(mask, x.numpy()),
        "weight": where(mask, log_weight.exp().numpy()),
    }
