"""What the ledger of groups does not hold: why they were lost, how long they were and took."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.workflows.episode_log import EpisodeTimes

NUM_SLOWEST = 10


@dataclass(frozen=True)
class GroupRecord:
    """How long a group took, and what became of it.

    Args:
        row_id: of its prompt.
        seconds: from its submission until its workflow returned, or it was dropped.
        num_sampled: tokens of all its trajectories.
        fate: what became of it.
        versions: head and tail version; None if nothing was sampled.
        times: of its trajectories, added up.
    """

    row_id: str
    seconds: float
    num_sampled: int
    fate: Literal["trained", "stale", "overdue"]
    versions: tuple[int, int] | None
    times: EpisodeTimes


@dataclass
class RolloutTelemetry:
    """Lengths are sampled tokens of whole groups.

    ``num_diverged`` groups of a checkpoint were sampled from scratch, because their workflow did
    not repeat what was saved of them. ``times`` add up what the trajectories of ``timed_groups``
    took; ``group_s`` is from the submission of each of these groups until its workflow returned.
    ``slowest`` holds the groups that took longest of all that were trained or dropped.
    """

    num_overdue: int = 0
    trained_groups: int = 0
    trained_tokens: int = 0
    dropped_groups: int = 0
    dropped_tokens: int = 0
    rejections: dict[str, int] = field(default_factory=dict[str, int])
    num_diverged: int = 0
    timed_groups: int = 0
    group_s: float = 0.0
    times: EpisodeTimes = field(default_factory=EpisodeTimes)
    slowest: list[GroupRecord] = field(default_factory=list[GroupRecord])

    def on_finished(self, seconds: float, times: EpisodeTimes) -> None:
        """A workflow returned a group."""
        self.timed_groups += 1
        self.group_s += seconds
        self.times += times

    def on_ended(self, record: GroupRecord) -> None:
        """A group is handed to the trainer, or dropped."""
        if record.fate == "trained":
            self.trained_groups += 1
            self.trained_tokens += record.num_sampled
        else:
            self.dropped_groups += 1
            self.dropped_tokens += record.num_sampled
        self.num_overdue += record.fate == "overdue"
        bisect.insort(self.slowest, record, key=lambda r: -r.seconds)
        del self.slowest[NUM_SLOWEST:]


@dataclass(frozen=True)
class RolloutCounts:
    """Numbers of groups and what they took, so far in a run; those of several ranks add up.

    Attributes:
        running: groups that run.
        pending: finished groups that wait to be trained.
        rejected: groups with nothing to train on.
        failed: groups that ended in an error.
        dropped_stale: finished groups that went stale.
        dropped_overdue: running groups that went stale.
        diverged: restored groups that were sampled from scratch.
        trained_groups: groups handed to the trainer.
        trained_tokens: their sampled tokens.
        dropped_groups: all groups that went stale.
        dropped_tokens: their sampled tokens.
        timed_groups: groups whose workflow returned.
        group_s: seconds from submission to that return, added up over the timed groups.
        times: what their trajectories took, added up.
        generated: tokens sampled since the batch before.
        workflow: counts of the workflow, by its own names.
    """

    running: int = 0
    pending: int = 0
    rejected: int = 0
    failed: int = 0
    dropped_stale: int = 0
    dropped_overdue: int = 0
    diverged: int = 0
    trained_groups: int = 0
    trained_tokens: int = 0
    dropped_groups: int = 0
    dropped_tokens: int = 0
    timed_groups: int = 0
    group_s: float = 0.0
    times: EpisodeTimes = field(default_factory=EpisodeTimes)
    generated: int = 0
    workflow: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def from_ledger(
        cls,
        stat: RolloutStat,
        telemetry: RolloutTelemetry,
        *,
        workflow: Mapping[str, int],
        generated: int,
    ) -> RolloutCounts:
        """The counts of one rank, from its ledger and telemetry."""
        return cls(
            running=stat.running,
            pending=stat.pending,
            rejected=stat.rejected,
            failed=stat.failed,
            dropped_stale=stat.dropped - telemetry.num_overdue,
            dropped_overdue=telemetry.num_overdue,
            diverged=telemetry.num_diverged,
            trained_groups=telemetry.trained_groups,
            trained_tokens=telemetry.trained_tokens,
            dropped_groups=telemetry.dropped_groups,
            dropped_tokens=telemetry.dropped_tokens,
            timed_groups=telemetry.timed_groups,
            group_s=telemetry.group_s,
            times=telemetry.times,
            generated=generated,
            workflow=dict(workflow),
        )

    def __add__(self, other: RolloutCounts) -> RolloutCounts:
        names = [f.name for f in fields(self) if f.name != "workflow"]
        workflow = {
            name: self.workflow.get(name, 0) + other.workflow.get(name, 0)
            for name in {**self.workflow, **other.workflow}
        }
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RolloutCounts(**sums, workflow=workflow)

    def metrics(self) -> dict[str, float]:
        """The values that are logged, by their names."""
        trained_length = self.trained_tokens / max(1, self.trained_groups)
        ended_tokens = self.trained_tokens + self.dropped_tokens
        ended_length = ended_tokens / max(1, self.trained_groups + self.dropped_groups)
        num_trajectories = max(1, self.times.num)
        return {
            "rollout/running": float(self.running),
            "rollout/pending": float(self.pending),
            "rollout/rejected": float(self.rejected),
            "rollout/failed": float(self.failed),
            "rollout/dropped_stale": float(self.dropped_stale),
            "rollout/dropped_overdue": float(self.dropped_overdue),
            "rollout/diverged": float(self.diverged),
            **{f"rollout/{name}": float(count) for name, count in self.workflow.items()},
            "rollout/trained_length": trained_length,
            "rollout/dropped_length": self.dropped_tokens / max(1, self.dropped_groups),
            "rollout/length_ratio": trained_length / max(1e-9, ended_length),
            "rollout_time/group_s": self.group_s / max(1, self.timed_groups),
            "rollout_time/sample_s": self.times.sample_s / num_trajectories,
            "rollout_time/tool_s": self.times.tool_s / num_trajectories,
            "rollout_time/reward_s": self.times.reward_s / num_trajectories,
        }
