"""What a checkpoint knows of one group, finished or not, whatever form the checkpoint has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import FinishReason, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode_log import Event, log_parts

_NONE: Mapping[str, float] = MappingProxyType({})


class SavedResult(NamedTuple):
    """What a trajectory has beside its parts."""

    reward: float
    finish_reason: FinishReason
    rewards: Mapping[str, float] = _NONE
    reward_weights: Mapping[str, float] = _NONE


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


def save_group(group: InFlightGroup) -> SavedGroup:
    """What a checkpoint is to know of ``group``; copies nothing."""
    logs: Sequence[Sequence[Event]]
    results: Sequence[SavedResult] | None
    if group.finished is None:
        logs, results = group.session.logs, None
    else:
        trajectories = group.finished.trajectories
        logs = [t.parts for t in trajectories]
        results = [
            SavedResult(t.reward, t.finish_reason, t.rewards, t.reward_weights)
            for t in trajectories
        ]
    row = group.row
    return SavedGroup(
        row.epoch, row.index, row.row_id, group.order, group.created_version, logs, results
    )


def has_rewards(group: TrajectoryGroup, names: Collection[str]) -> bool:
    """Whether the trajectories of ``group`` have rewards of just these ``names``."""
    return all(set(t.rewards) == set(names) for t in group.trajectories)


def reweighted(group: TrajectoryGroup, weights: Mapping[str, float]) -> TrajectoryGroup:
    """The group with these weights of its named rewards; unchanged if there are none."""
    if not weights:
        return group
    trajectories = tuple(t.with_rewards(t.rewards, weights) for t in group.trajectories)
    return replace(group, trajectories=trajectories)
