"""Telemetry of groups: why they were lost, their lengths in tokens and their durations."""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from sdp_lightning.rewards.call_threads import CallLoad
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.workflows.episode_log import EpisodeTimes
from sdp_lightning.workflows.workflow import RolloutSession

logger = logging.getLogger(__name__)

NUM_SLOWEST = 10
MOST_NAMES = 20  # reasons or causes that are told apart
OTHERS = "other"


def count_name(counts: dict[str, int], name: str) -> int:
    """Add 1 to the count of ``name``, or of ``"other"`` if there are many; returns the count."""
    key = name if name in counts or len(counts) < MOST_NAMES else OTHERS
    counts[key] = counts.get(key, 0) + 1
    return counts[key]


@dataclass(frozen=True)
class GroupRecord:
    """One group that was trained or dropped.

    Args:
        row_id: id of its prompt.
        seconds: duration from its submission until its workflow returned, or it was dropped.
        num_sampled: sampled tokens of all its trajectories.
        fate: trained, or dropped after it had finished ("stale") or while it ran ("overdue").
        versions: head and tail version; None if nothing was sampled.
        times: times of its trajectories, added up.
    """

    row_id: str
    seconds: float
    num_sampled: int
    fate: Literal["trained", "stale", "overdue"]
    versions: tuple[int, int] | None
    times: EpisodeTimes


@dataclass
class RolloutTelemetry:
    """Totals of a run.

    Attributes:
        num_overdue: groups that were dropped while they ran.
        trained_groups: groups handed to the trainer.
        trained_tokens: sampled tokens of these groups.
        dropped_groups: all groups that were dropped.
        dropped_tokens: sampled tokens of these groups.
        rejections: rejected groups by reason.
        num_left_out: samples that their groups went on, or were rejected, without.
        errors: infrastructure errors by cause.
        num_aside: overdue groups of which only a reward or an environment still ran.
        num_diverged: groups of a checkpoint that were sampled from scratch, because their workflow
            did not repeat its saved steps.
        num_discarded: groups of a checkpoint that were not resumed, as the prompts began anew.
        timed_groups: groups whose workflow returned.
        group_s: seconds from the submission of these groups to that return, added up.
        times: times of the trajectories of these groups, added up.
        slowest: the groups with the longest durations among those trained or dropped.
    """

    num_overdue: int = 0
    num_aside: int = 0
    trained_groups: int = 0
    trained_tokens: int = 0
    dropped_groups: int = 0
    dropped_tokens: int = 0
    rejections: dict[str, int] = field(default_factory=dict[str, int])
    num_left_out: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])
    num_diverged: int = 0
    num_discarded: int = 0
    timed_groups: int = 0
    group_s: float = 0.0
    times: EpisodeTimes = field(default_factory=EpisodeTimes)
    slowest: list[GroupRecord] = field(default_factory=list[GroupRecord])

    @property
    def errors_text(self) -> str:
        """The infrastructure errors by cause, as a sentence; empty if there are none."""
        causes = [f"{count} x {cause}" for cause, count in self.errors.items()]
        return f" Infrastructure errors so far: {', '.join(causes)}." if causes else ""

    def on_finished(self, seconds: float, times: EpisodeTimes) -> None:
        """A workflow returned a group."""
        self.timed_groups += 1
        self.group_s += seconds
        self.times += times

    def on_errors(self, row_id: str, session: RolloutSession) -> None:
        """A group has ended: count its infrastructure errors, and name each cause once."""
        self.num_left_out += session.num_left_out
        for cause in session.take_errors():
            if count_name(self.errors, cause) == 1:
                logger.warning(
                    "infrastructure failed for a sample of row %r: %s. It is tried again, or left "
                    "out of its group. Further ones are only counted.",
                    *(row_id, cause),
                )

    def on_aside(self, row_id: str, aside_s: float) -> None:
        """A group went stale of which only a reward or an environment still ran."""
        self.num_aside += 1
        if self.num_aside == 1:
            logger.warning(
                "row %r went stale while its reward or environment ran: nothing of it was sampled "
                "for %.1f s. Make that faster, or lower its deadline (reward_timeout_s): no "
                "max_head_lag helps one that hangs. Further ones are only counted.",
                *(row_id, aside_s),
            )

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
    """A rank's totals when a batch was taken; those of several ranks add up.

    ``running`` to ``failed`` are states of the ledger; ``trained_groups`` to ``times`` are those of
    :class:`RolloutTelemetry`.

    Attributes:
        dropped_stale: groups that were dropped after they had finished.
        dropped_overdue: groups that were dropped while they ran.
        left_out: samples that infrastructure errors cost their groups.
        diverged: restored groups that were sampled from scratch.
        discarded: groups of a checkpoint that were not resumed.
        generated: tokens sampled since the batch before.
        calls_running: calls of plain rewards and environments, and long texts, that have a thread.
        calls_waiting: calls that wait for a thread.
        calls_lost: calls that were given up at their timeout and still hold a thread.
        errors: infrastructure errors by cause.
        workflow: counts of the workflow, by its own names.
    """

    running: int = 0
    pending: int = 0
    rejected: int = 0
    failed: int = 0
    dropped_stale: int = 0
    dropped_overdue: int = 0
    left_out: int = 0
    diverged: int = 0
    discarded: int = 0
    trained_groups: int = 0
    trained_tokens: int = 0
    dropped_groups: int = 0
    dropped_tokens: int = 0
    timed_groups: int = 0
    group_s: float = 0.0
    times: EpisodeTimes = field(default_factory=EpisodeTimes)
    generated: int = 0
    calls_running: int = 0
    calls_waiting: int = 0
    calls_lost: int = 0
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    workflow: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def from_ledger(
        cls,
        stat: RolloutStat,
        telemetry: RolloutTelemetry,
        *,
        workflow: Mapping[str, int],
        generated: int,
        calls: CallLoad | None = None,
    ) -> RolloutCounts:
        """The counts of one rank, from its ledger and telemetry, and the threads for calls."""
        running, waiting, lost = calls or CallLoad()
        return cls(
            running=stat.running,
            pending=stat.pending,
            rejected=stat.rejected,
            failed=stat.failed,
            dropped_stale=stat.dropped - telemetry.num_overdue,
            dropped_overdue=telemetry.num_overdue,
            left_out=telemetry.num_left_out,
            diverged=telemetry.num_diverged,
            discarded=telemetry.num_discarded,
            trained_groups=telemetry.trained_groups,
            trained_tokens=telemetry.trained_tokens,
            dropped_groups=telemetry.dropped_groups,
            dropped_tokens=telemetry.dropped_tokens,
            timed_groups=telemetry.timed_groups,
            group_s=telemetry.group_s,
            times=telemetry.times,
            generated=generated,
            calls_running=running,
            calls_waiting=waiting,
            calls_lost=lost,
            errors=dict(telemetry.errors),
            workflow=dict(workflow),
        )

    def __add__(self, other: RolloutCounts) -> RolloutCounts:
        by_name = ("errors", "workflow")
        names = [f.name for f in fields(self) if f.name not in by_name]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RolloutCounts(
            **sums,
            errors=_add_by_name(self.errors, other.errors),
            workflow=_add_by_name(self.workflow, other.workflow),
        )

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
            "rollout/left_out": float(self.left_out),
            **{f"rollout/error/{key}": float(n) for key, n in _by_key(self.errors).items()},
            "rollout/diverged": float(self.diverged),
            "rollout/cut_tokens": float(self.times.num_cut),
            "rollout/discarded": float(self.discarded),
            "rollout/calls_running": float(self.calls_running),
            "rollout/calls_waiting": float(self.calls_waiting),
            "rollout/calls_lost": float(self.calls_lost),
            **{f"rollout/{name}": float(count) for name, count in self.workflow.items()},
            "rollout/trained_length": trained_length,
            "rollout/dropped_length": self.dropped_tokens / max(1, self.dropped_groups),
            "rollout/length_ratio": trained_length / max(1e-9, ended_length),
            "rollout_time/group_s": self.group_s / max(1, self.timed_groups),
            "rollout_time/sample_s": self.times.sample_s / num_trajectories,
            "rollout_time/tool_s": self.times.tool_s / num_trajectories,
            "rollout_time/reward_s": self.times.reward_s / num_trajectories,
        }


def _add_by_name(counts: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    return {
        name: counts.get(name, 0) + others.get(name, 0) for name in sorted({**counts, **others})
    }


def _by_key(errors: Mapping[str, int]) -> dict[str, int]:
    """Counts by the part of a metric's name that a cause becomes: a_judge_timed_out."""
    counts: dict[str, int] = {}
    for cause, count in errors.items():
        key = re.sub(r"[^a-z0-9]+", "_", cause.lower()).strip("_")[:40] or OTHERS
        counts[key] = counts.get(key, 0) + count
    return counts
