"""Where the time of a run went, and which floor no overlap can go below. Seconds.

A step is from the end of a publish to the end of the next. Each of its moments is in one phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdp_lightning.lightning.phase_timer import PHASES

Row = Mapping[str, float]
_WAITS = {  # parts of a rollout's time, which a wait is divided like
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
class Account:
    """What some steps took.

    Args:
        num_steps: how many.
        total_s: from the first one's beginning to the last one's end.
        phases: seconds of each phase under its label; they add up to ``total_s``.
        wait_s: of them, all waiting for batches.
        sampling_s: at least one request was being sampled, beside the phases.
        floor_s: max(T_gen, T_score + T_train) + publish + evaluations: what the steps would take if
            sampling, at the speed that it had, and training overlapped without a gap.
    """

    num_steps: int
    total_s: float
    phases: Mapping[str, float]
    wait_s: float
    sampling_s: float
    floor_s: float

    def share(self, label: str) -> float:
        """Of the time, what went into one phase."""
        return self.phases.get(label, 0.0) / self.total_s

    @property
    def wait_share(self) -> float:
        """Of the time, what the trainer waited for batches."""
        return self.wait_s / self.total_s

    @property
    def sampling_share(self) -> float:
        """Of the time, that in which the engine sampled."""
        return min(1.0, self.sampling_s / self.total_s)

    @property
    def floor_share(self) -> float:
        """The floor over what it took: 1 is perfect overlap."""
        return self.floor_s / self.total_s


def account_of(rows: Sequence[Row]) -> Account | None:
    """The account of the steps whose metrics ``rows`` are; None without times.

    A wait is divided into its parts as the rollouts' own time is: an estimate.
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
    return Account(len(rows), total, phases, spent["wait"], sampling, floor)


def wait_parts(row: Row) -> dict[str, float]:
    """Shares that add up to 1, of the parts that there are; samples alone if nothing is known."""
    times = {label: row.get(name, 0.0) for label, name in _WAITS.items()}
    total = sum(times.values())
    if total <= 0:
        return {next(iter(_WAITS)): 1.0}
    return {
        label: seconds / total
        for label, seconds in times.items()
        if seconds > 0 or "tools" not in label
    }


def reward_share(row: Row) -> float:
    """Of a rollout's time, what its reward took."""
    return wait_parts(row).get("wait for rewards", 0.0)
