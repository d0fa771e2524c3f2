"""Advice on a run, in words with its numbers.

The later half of the steps is judged: the first ones fill the pipeline and warm up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sdp_lightning.config import RolloutConfig
from sdp_lightning.observability.report.files import RunConfigs
from sdp_lightning.observability.report.series import mean, values_of
from sdp_lightning.observability.report.time_breakdown import (
    REST,
    TimeBreakdown,
    reward_share,
    speeds_by_concurrency,
    time_breakdown,
)
from sdp_lightning.training.metrics.health import health_warnings
from sdp_lightning.training.metrics.names import MetricRow

LEAST_STEPS = 4
LONG_WAIT, SHORT_WAIT = 0.15, 0.05
LOW_FLOOR = 0.8
MUCH = 0.15  # share of the time, for a phase that is neither waiting nor training
DROPS = 0.05  # share of the groups
UNIFORM = 0.7  # share of the groups
FLAT = 20  # batches with the same reward
REMEDIES = {
    "publishing weights": "Use another transport, train fewer layers, or take larger batches.",
    "scoring": "segment_proximal='loglinear' or trust_region='behavior' need no scoring.",
    "evaluating": "Validate less often (val_check_interval), or on fewer rows.",
    REST: "Look at checkpoints, loggers and callbacks: they run between two steps.",
}


@dataclass(frozen=True)
class Advice:
    """One observation about a run.

    Args:
        kind: stable name of the advice.
        tone: ``"good"``, ``"hint"``, or ``"bad"``: it costs time or harms learning.
        text: the observation with its numbers, and what to change.
    """

    kind: str
    tone: Literal["good", "hint", "bad"]
    text: str


def advice_on(rows: Sequence[MetricRow], configs: RunConfigs) -> list[Advice]:
    """Advice on a run, the worst first.

    Args:
        rows: the metrics of every step.
        configs: settings of the run, as far as they are known.
    """
    late = rows[len(rows) // 2 :]
    breakdown = time_breakdown(late)
    if len(rows) < LEAST_STEPS or breakdown is None:
        return [Advice("too_short", "hint", f"{len(rows)} steps are too few to judge the run by.")]
    means = {name: mean(late, name) for name in late[-1]}
    bends_bridge = configs.loss is not None and configs.loss.bends_bridge
    warnings = health_warnings(means, leaves_bridge_out=bends_bridge)
    advice = [
        *_bottleneck(late, breakdown, configs),
        *_overheads(breakdown),
        *_rollouts(rows, configs.rollout),
        *_concurrency(rows),
        *_learning(rows),
        *(Advice(w.kind, "bad", w.text[0].upper() + w.text[1:]) for w in warnings),
    ]
    return sorted(advice, key=lambda each: ("bad", "hint", "good").index(each.tone))


def _bottleneck(
    rows: Sequence[MetricRow], breakdown: TimeBreakdown, configs: RunConfigs
) -> Iterator[Advice]:
    wait, floor = breakdown.wait_share, breakdown.floor_share
    lag_bound = None if configs.rollout is None else configs.rollout.max_head_lag
    if lag_bound == 0 and floor < LOW_FLOOR:
        text = (
            f"Sampling and training take turns: max_head_lag=0 allows no overlap, and steps take "
            f"{1 / floor:.1f} times the floor. Set max_head_lag to 1 or 2."
        )
        yield Advice("in_turn", "bad", text)
    elif wait > LONG_WAIT:
        text = (
            f"The trainer waits {wait:.0%} of the time for rollouts, and the engine samples "
            f"{breakdown.sampling_share:.0%} of it. {_faster_rollouts(rows, configs.rollout)}"
        )
        yield Advice("trainer_waits", "bad", text)
    elif wait < SHORT_WAIT:
        text = (
            f"The trainer is the bottleneck: it waits {wait:.0%} of the time, and "
            f"{breakdown.share('forward and backward'):.0%} is forward and backward. "
            f"{_faster_training(configs)}"
        )
        yield Advice("trainer_bound", "hint", text)
        lag = mean(rows, "lag/mean")
        if lag_bound and lag > 0.7 * lag_bound:
            text = (
                f"Tokens are {lag:.1f} versions old in the mean, of at most {lag_bound}, while "
                "the trainer hardly waits: lower max_head_lag or max_concurrent, and they get "
                "fresher at the same speed."
            )
            yield Advice("old_tokens", "hint", text)
    if floor >= 0.9 and (wait <= LONG_WAIT or len(breakdown.speeds) > 1):
        text = (
            f"Sampling and training overlap: steps are at {floor:.0%} of the floor that the "
            "slower of the two sets."
        )
        yield Advice("near_floor", "good", text)
    elif lag_bound != 0 and floor < LOW_FLOOR:
        text = (
            f"Steps reach {floor:.0%} of the floor: neither side is busy all the time. Larger "
            "max_head_lag or max_concurrent, or rollouts of more equal lengths, close the gaps."
        )
        yield Advice("gaps", "bad", text)


def _concurrency(rows: Sequence[MetricRow]) -> Iterator[Advice]:
    """Name the fastest ``max_concurrent`` of a run that tried several."""
    speeds, last = speeds_by_concurrency(rows), int(rows[-1].get("rollout/concurrency", 0))
    if len(speeds) < 2 or last not in speeds:
        return
    best = max(speeds, key=lambda setting: speeds[setting])
    gain = speeds[best] / speeds[last] - 1
    if gain < 0.05:
        text = f"max_concurrent='auto' ended at {last} groups at once, the fastest that it tried"
        yield Advice("concurrency", "good", f"{text}, or within 5 % of it.")
    else:
        text = f"max_concurrent={best} would train {gain:.0%} more tokens a second than {last}"
        yield Advice("concurrency", "hint", f"{text}, where max_concurrent='auto' ended.")


def _faster_rollouts(rows: Sequence[MetricRow], rollout: RolloutConfig | None) -> str:
    running = mean(rows, "rollout/running")
    if reward_share(rows[-1]) > 0.3:
        return (
            f"Rewards are {reward_share(rows[-1]):.0%} of a rollout: give them processes with "
            "reward_workers, or make them cheaper."
        )
    if rollout is None:
        return "Raise max_concurrent or add a replica."
    if rollout.max_concurrent == "auto" and rollout.max_head_lag:
        return (
            "max_concurrent='auto' tries how many groups at once are the fastest: what is left is "
            "a faster engine, or a replica."
        )
    if running >= 0.8 * rollout.concurrency:
        return (
            f"All of max_concurrent={rollout.concurrency} groups run: raise it if the engine has "
            "memory left, or add a replica."
        )
    return (
        f"Only {running:.0f} of max_concurrent={rollout.concurrency} groups run in the mean: the "
        "bound on staleness holds rollouts back. Raise max_head_lag, or add a replica."
    )


def _faster_training(configs: RunConfigs) -> str:
    steps = 1 if configs.update is None else configs.update.steps_per_batch
    if steps > 1 and configs.loss is not None and configs.loss.proximal == "recompute":
        return (
            f"With {steps} optimizer steps a batch, every batch is scored once more before them: "
            "proximal='loglinear' leaves that out, and so does one step a batch."
        )
    return "A larger micro-batch, another device or fewer trained layers make it faster."


def _overheads(breakdown: TimeBreakdown) -> Iterator[Advice]:
    for label, remedy in REMEDIES.items():
        if breakdown.share(label) > MUCH:
            phase = "in no phase" if label == REST else label
            text = f"{breakdown.share(label):.0%} of the time is {phase}. {remedy}"
            yield Advice(f"much_{label.split()[-1]}", "bad", text)


def _rollouts(rows: Sequence[MetricRow], rollout: RolloutConfig | None) -> Iterator[Advice]:
    last = rows[-1]
    consumed = len(rows) * (0 if rollout is None else rollout.batch_size)
    stale, overdue = last.get("rollout/dropped_stale", 0), last.get("rollout/dropped_overdue", 0)
    ended = consumed + stale + overdue
    if ended and (stale + overdue) / ended > DROPS:
        text = (
            f"{(stale + overdue) / ended:.0%} of the groups were dropped as too old ({stale:.0f} "
            f"while they waited, {overdue:.0f} while they ran). Dropped ones had "
            f"{last.get('rollout/dropped_length', 0):.0f} tokens in the mean, trained ones "
            f"{last.get('rollout/trained_length', 0):.0f}: training is biased against long "
            "rollouts. Raise max_head_lag, lower max_concurrent, or use on_overdue='wait'."
        )
        yield Advice("many_dropped", "bad", text)
    for name, why in (("rejected", "the workflow returned nothing"), ("failed", "it raised")):
        count = last.get(f"rollout/{name}", 0)
        if count and count > DROPS * (consumed + count):
            text = f"{count:.0f} groups were {name}: {why}. Look at the reasons below and the log."
            yield Advice(f"many_{name}", "bad", text)


def _learning(rows: Sequence[MetricRow]) -> Iterator[Advice]:
    rewards = values_of(rows, "train/reward")
    if len(rewards) >= FLAT and max(rewards[-FLAT:]) == min(rewards[-FLAT:]):
        text = (
            f"The reward was {rewards[-1]:.3g} in each of the last {FLAT} batches: if rewards "
            "agree within groups, too, nothing is learned. Look at the trajectories below."
        )
        yield Advice("flat_reward", "bad", text)
    uniform = mean(rows[len(rows) // 2 :], "train/uniform")
    if uniform > UNIFORM:
        text = (
            f"In {uniform:.0%} of the groups all rewards are equal, and such a group has no "
            "learning signal: drop them (ShapedWorkflow with AllEqual), give partial credit, or "
            "use rows that are neither too hard nor solved."
        )
        yield Advice("uniform", "bad", text)
    skipped = mean(rows, "train/skipped")
    if skipped > 0:
        text = f"{skipped:.1%} of the optimizer steps were skipped: the gradient was not finite."
        yield Advice("skipped", "bad", text)
    truncated = mean(rows[len(rows) // 2 :], "train/truncated")
    if truncated > 0.3:
        text = (
            f"{truncated:.0%} of the trajectories end at their token budget: raise max_new_tokens "
            "if their rewards need the end."
        )
        yield Advice("truncated", "hint", text)
