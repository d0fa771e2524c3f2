"""Time of a run by phase, and the floor that no overlap can go below. Seconds.

A step lasts from the end of a publish to the end of the next. Each of its moments is in one phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdp_lightning.lightning.phase_timer import PHASES
from sdp_lightning.rollout.concurrency import SETTLE
from sdp_lightning.training.metrics.names import MetricRow

_WAITS = {  # parts of a rollout's time, in whose proportion a wait is divided
    "wait for samples": "rollout_time/sample_s",
    "wait for tools": "rollout_time/tool_s",
    "wait for rewards": "rollout_time/reward_s",
}
LABELS = {
    "score": "scoring",
    "train": "forward and backward",
    "publish": "publishing weights",
    "evaluate": "evaluating",
}
REST = "the rest"


@dataclass(frozen=True)
class TimeBreakdown:
    """Time of some steps.

    Args:
        num_steps: number of steps.
        total_s: time from the beginning of the first to the end of the last.
        phases: seconds of each phase by its label; they add up to ``total_s``.
        wait_s: the part of it that the trainer waited for batches.
        sampling_s: time in which at least one request was being sampled, beside the phases.
        floor_s: max(T_gen, T_score + T_train) + publish + evaluations: what the steps would take if
            sampling, at the speed that it had, and training overlapped without a gap. Where several
            numbers of groups at once were tried, it is not above what the tokens of these steps
            would take at the fastest of them: a run does not reach its floor by sampling slowly.
        speeds: trained tokens a second by groups at once, of a run that tried several.
    """

    num_steps: int
    total_s: float
    phases: Mapping[str, float]
    wait_s: float
    sampling_s: float
    floor_s: float
    speeds: Mapping[int, float] = field(default_factory=dict[int, float])

    def share(self, label: str) -> float:
        """Share of the time that one phase took."""
        return self.phases.get(label, 0.0) / self.total_s

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return self.total_s / self.num_steps

    @property
    def wait_share(self) -> float:
        """Share of the time that the trainer waited for batches."""
        return self.wait_s / self.total_s

    @property
    def sampling_share(self) -> float:
        """Share of the time in which the engine sampled."""
        return min(1.0, self.sampling_s / self.total_s)

    @property
    def floor_share(self) -> float:
        """The floor over the time that the steps took: 1 is perfect overlap."""
        return self.floor_s / self.total_s


def time_breakdown(rows: Sequence[MetricRow]) -> TimeBreakdown | None:
    """Time of the steps with these metrics; None if no times were logged.

    A wait is divided into its parts in proportion to the rollouts' own time: an estimate.
    """
    rows = [row for row in rows if row.get("time/step_s", 0.0) > 0]
    if not rows:
        return None
    spent = {phase: sum(row.get(f"time/{phase}_s", 0.0) for row in rows) for phase in PHASES}
    total = max(sum(row["time/step_s"] for row in rows), sum(spent.values()))
    phases = {label: spent["wait"] * part for label, part in wait_parts(rows[-1]).items()}
    phases |= {label: spent[phase] for phase, label in LABELS.items()}
    phases[REST] = total - sum(phases.values())
    sampling = sum(row.get("time/sampling_s", 0.0) for row in rows)
    generation = max(0.0, sampling - spent["evaluate"])
    floor = max(generation, spent["score"] + spent["train"])
    floor = min(total, floor + spent["publish"] + spent["evaluate"])
    if len(speeds := speeds_by_concurrency(rows)) > 1:
        tokens = sum(row["speed/train_tokens_per_s"] * row["time/step_s"] for row in rows)
        floor = min(floor, tokens / max(speeds.values()) + spent["evaluate"])
    return TimeBreakdown(len(rows), total, phases, spent["wait"], sampling, floor, speeds)


def speeds_by_concurrency(rows: Sequence[MetricRow]) -> dict[int, float]:
    """Trained tokens a second of each ``max_concurrent`` that ``"auto"`` tried for some steps.

    The first steps of each are left out: their groups began at another one.
    """
    sums: dict[int, tuple[float, float]] = {}
    before, num_same = 0.0, 0
    for row in rows:
        setting = row.get("rollout/concurrency", 0.0)
        num_same = num_same + 1 if setting == before else 0
        before = setting
        if setting and num_same >= SETTLE and row["speed/train_tokens_per_s"] > 0:
            step_s = row["time/step_s"]
            tokens, seconds = sums.get(int(setting), (0.0, 0.0))
            tokens += row["speed/train_tokens_per_s"] * step_s
            sums[int(setting)] = tokens, seconds + step_s - row.get("time/evaluate_s", 0.0)
    return {setting: tokens / s for setting, (tokens, s) in sorted(sums.items()) if s > 0}


def wait_parts(row: MetricRow) -> dict[str, float]:
    """Shares of a wait by its parts, which add up to 1; samples alone if no times are known."""
    times = {label: row.get(name, 0.0) for label, name in _WAITS.items()}
    total = sum(times.values())
    if total <= 0:
        return {next(iter(_WAITS)): 1.0}
    return {
        label: seconds / total
        for label, seconds in times.items()
        if seconds > 0 or "tools" not in label
    }


def reward_share(row: MetricRow) -> float:
    """Share of a rollout's time that its reward took."""
    return wait_parts(row).get("wait for rewards", 0.0)
