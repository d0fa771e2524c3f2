"""What the ledger of groups does not hold: why they were lost, how long they were and took."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.workflows.episode_log import EpisodeTimes

NUM_SLOWEST = 10
Counts = dict[str, float]  # by name; added up over ranks


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


def count(stat: RolloutStat, telemetry: RolloutTelemetry, others: Mapping[str, int]) -> Counts:
    """What has become of groups so far. What has a name in ``rollout/`` is logged as it is.

    Args:
        stat: the ledger.
        telemetry: what it does not hold.
        others: what the workflow counts.
    """
    return {
        "rollout/running": stat.running,
        "rollout/pending": stat.pending,
        "rollout/rejected": stat.rejected,
        "rollout/failed": stat.failed,
        "rollout/dropped_stale": stat.dropped - telemetry.num_overdue,
        "rollout/dropped_overdue": telemetry.num_overdue,
        "rollout/diverged": telemetry.num_diverged,
        **{f"rollout/{name}": number for name, number in others.items()},
        "trained": telemetry.trained_groups,
        "trained_tokens": telemetry.trained_tokens,
        "dropped": telemetry.dropped_groups,
        "dropped_tokens": telemetry.dropped_tokens,
        "timed": telemetry.timed_groups,
        "group_s": telemetry.group_s,
        "rows": telemetry.times.num,
        "sample_s": telemetry.times.sample_s,
        "tool_s": telemetry.times.tool_s,
        "reward_s": telemetry.times.reward_s,
    }
