"""One submitted row on its way to becoming a group that is trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.rollout.groups.telemetry import GroupRecord
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode_log import EpisodeTimes, VersionRange, log_parts
from sdp_lightning.workflows.workflow import RolloutSession

Parts = tuple[Context | Segment, ...]


@dataclass(eq=False)
class InFlightGroup:
    """One submitted row and its trajectories so far.

    Attributes:
        finished: the group that the workflow returned; None while it runs.
        in_training: whether the trainer has the group and its version is not committed yet.
        started_at: time of the submission, by ``time.monotonic``.
        seconds: duration until the workflow returned; 0 if the group was finished in a checkpoint.
    """

    order: int
    row: PromptRow
    created_version: int
    session: RolloutSession
    task_id: int | None = None
    finished: TrajectoryGroup | None = None
    in_training: bool = False
    started_at: float = field(default_factory=time.monotonic)
    seconds: float | None = None

    @property
    def parts(self) -> list[Parts]:
        """Parts of each trajectory so far, those still to be restored included."""
        if self.finished is not None:
            return [trajectory.parts for trajectory in self.finished.trajectories]
        return [log_parts(log) for log in self.session.logs]

    @property
    def versions(self) -> VersionRange:
        """Head and tail version so far; None before the first closed segment."""
        if self.finished is not None:
            head, tail = self.finished.head_version, self.finished.tail_version
            return None if head is None or tail is None else (head, tail)
        return self.session.versions

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        return sum(len(p) for parts in self.parts for p in parts if isinstance(p, Segment))

    @property
    def aside_s(self) -> float | None:
        """Seconds since any of its trajectories was sampled: what runs is a reward or a tool.

        None if one is sampled, or has not begun.
        """
        aside = [episode.aside_s for episode in self.session.episodes]
        known = [seconds for seconds in aside if seconds is not None]
        return min(known) if known and len(known) == len(aside) else None

    def make_group(self, trajectories: Sequence[Trajectory]) -> TrajectoryGroup:
        """The finished group of the trajectories that its workflow returned."""
        return TrajectoryGroup(
            tuple(trajectories),
            row_id=self.row.row_id,
            order=self.order,
            created_version=self.created_version,
        )

    @property
    def times(self) -> EpisodeTimes:
        """Times of its trajectories so far, added up."""
        return sum((episode.times for episode in self.session.episodes), EpisodeTimes())

    def record(self, fate: Literal["trained", "stale", "overdue"]) -> GroupRecord:
        """Its entry in the telemetry, once it is trained or dropped."""
        seconds = time.monotonic() - self.started_at if self.seconds is None else self.seconds
        row_id, sampled = self.row.row_id, self.num_sampled
        return GroupRecord(row_id, seconds, sampled, fate, self.versions, self.times)
