"""What a checkpoint knows of one group, finished or not, whatever form the checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import FinishReason, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode_log import Event, log_parts


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
        results: reward and finish reason of each trajectory; None for a group under way.
    """

    epoch: int
    index: int
    row_id: str
    order: int
    created_version: int
    logs: Sequence[Sequence[Event]]
    results: Sequence[tuple[float, FinishReason]] | None

    def finished(self) -> TrajectoryGroup:
        """The group that was finished, with the proximals it had.

        Raises:
            RolloutError: if its trajectories make no sense.
        """
        return TrajectoryGroup(
            tuple(
                Trajectory(log_parts(log), reward=reward, finish_reason=reason)
                for log, (reward, reason) in zip(self.logs, self.results or (), strict=True)
            ),
            row_id=self.row_id,
            order=self.order,
            created_version=self.created_version,
        )


def save_group(group: InFlightGroup) -> SavedGroup:
    """What a checkpoint is to know of ``group``; copies nothing."""
    logs: Sequence[Sequence[Event]]
    results: Sequence[tuple[float, FinishReason]] | None
    if group.finished is None:
        logs, results = group.session.logs, None
    else:
        trajectories = group.finished.trajectories
        logs = [t.parts for t in trajectories]
        results = [(t.reward, t.finish_reason) for t in trajectories]
    row = group.row
    return SavedGroup(
        row.epoch, row.index, row.row_id, group.order, group.created_version, logs, results
    )
