"""What a checkpoint knows of one group, finished or not, whatever form the checkpoint has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import FinishReason, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode_log import Event, log_parts

logger = logging.getLogger(__name__)

_NONE: Mapping[str, float] = MappingProxyType({})


class SavedResult(NamedTuple):
    """What a trajectory has beside its parts."""

    reward: float
    finish_reason: FinishReason
    rewards: Mapping[str, float] = _NONE
    reward_weights: Mapping[str, float] = _NONE
    sample: int | None = None


@dataclass(frozen=True)
class SavedGroup:
    """A group in a checkpoint.

    Args:
        epoch: of its row.
        index: of its row among the prompts.
        row_id: name of its row.
        order: its place in the order of creation.
        created_version: policy version when it was submitted.
        logs: events of each episode; of a finished group, the parts of each trajectory.
        results: rewards and finish reason of each trajectory; None for a group under way.
    """

    epoch: int
    index: int
    row_id: str
    order: int
    created_version: int
    logs: Sequence[Sequence[Event]]
    results: Sequence[SavedResult] | None

    def finished(self) -> TrajectoryGroup:
        """The group that was finished, with the proximals it had.

        Raises:
            RolloutError: if its trajectories make no sense.
        """
        return TrajectoryGroup(
            tuple(
                Trajectory(log_parts(log), *result)
                for log, result in zip(self.logs, self.results or (), strict=True)
            ),
            row_id=self.row_id,
            order=self.order,
            created_version=self.created_version,
        )


def save_running(group: InFlightGroup) -> SavedGroup:
    """What a checkpoint is to know of a group under way, or of what it was; copies nothing."""
    return _save(group, group.session.logs, None)


def save_finished(group: InFlightGroup) -> SavedGroup:
    """What a checkpoint is to know of a finished group; copies nothing."""
    assert group.finished is not None
    trajectories = group.finished.trajectories
    results = [
        SavedResult(t.reward, t.finish_reason, t.rewards, t.reward_weights, t.sample)
        for t in trajectories
    ]
    return _save(group, [t.parts for t in trajectories], results)


def _save(
    group: InFlightGroup, logs: Sequence[Sequence[Event]], results: Sequence[SavedResult] | None
) -> SavedGroup:
    row = group.row
    return SavedGroup(
        row.epoch, row.index, row.row_id, group.order, group.created_version, logs, results
    )


def with_weights(
    restored: Sequence[tuple[InFlightGroup, TrajectoryGroup]], weights: Mapping[str, float]
) -> tuple[list[tuple[InFlightGroup, TrajectoryGroup]], list[InFlightGroup]]:
    """Finished groups with the weights of now, and those whose rewards have other names.

    Args:
        restored: the groups of a checkpoint.
        weights: weights of several rewards by name; empty changes nothing.
    """
    if not weights:
        return list(restored), []
    kept: list[tuple[InFlightGroup, TrajectoryGroup]] = []
    others: list[InFlightGroup] = []
    for group, done in restored:
        if all(t.rewards.keys() == weights.keys() for t in done.trajectories):
            trajectories = tuple(t.with_rewards(t.rewards, weights) for t in done.trajectories)
            kept.append((group, replace(done, trajectories=trajectories)))
        else:
            others.append(group)
    if others:
        logger.warning(
            "%d finished groups of the checkpoint have other rewards than %s: their rows begin "
            "anew",
            len(others),
            sorted(weights),
        )
    return kept, others
