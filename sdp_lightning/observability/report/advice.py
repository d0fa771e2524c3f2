"""What to change about a run, in words with its numbers.

Judges the later half of the steps: the first ones fill the pipeline and warm up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdp_lightning.observability.report.time_breakdown import (
    REST,
    Account,
    Row,
    account_of,
    reward_share,
)
from sdp_lightning.training.metrics.health import verdicts
from sdp_lightning.training.metrics.names import LAG_NAMES

LEAST_STEPS = 4
LONG_WAIT, SHORT_WAIT = 0.15, 0.05
LOW_FLOOR = 0.8
MUCH = 0.15  # of the time, for what is neither waiting nor training
DROPS = 0.05
UNIFORM = 0.7  # of the groups
FLAT = 20  # batches without a reward that differs


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do.

    Args:
        kind: its name, stable.
        tone: ``"good"``, ``"hint"``, or ``"bad"``: it costs time or teaches the wrong thing.
        text: what was found, with numbers, and what to change.
    """

    kind: str
    tone: Literal["good", "hint", "bad"]
    text: str


def advice_on(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Advice]:
    """What is to be said, the worst first.

    Args:
        rows: the metrics of every step.
        settings: of the run: ``rollout``, ``loss`` and ``update`` as mappings, as far as known.
    """
    late = rows[len(rows) // 2 :]
    account = account_of(late)
    if len(rows) < LEAST_STEPS or account is None:
        return [Advice("too_short", "hint", f"{len(rows)} steps are too few to judge the run by.")]
    found = [
        *_bottleneck(late, account, settings),
        *_overheads(account, settings),
        *_rollouts(rows, settings),
        *_learning(rows),
    ]
    means = {name: _mean(late, name) for name in late[-1]}
    bends = _setting(settings, "loss", "bridge_exponent", 1.0) != 1.0
    for verdict in verdicts(means, leaves_bridge_out=bends):
        found.append(Advice(verdict.kind, "bad", verdict.text[0].upper() + verdict.text[1:]))
    order = ("bad", "hint", "good")
    return sorted(found, key=lambda advice: order.index(advice.tone))


def _bottleneck(
    rows: Sequence[Row], account: Account, settings: Mapping[str, Any]
) -> Iterator[Advice]:
    wait, floor = account.wait_share, account.floor_share
    lag_bound = _setting(settings, "rollout", "max_head_lag", None)
    if lag_bound == 0 and floor < LOW_FLOOR:
        yield Advice(
            "in_turn",
            "bad",
            f"Sampling and training take turns: max_head_lag=0 allows no overlap, and steps take "
            f"{1 / floor:.1f} times the floor. Set max_head_lag to 1 or 2.",
        )
    elif wait > LONG_WAIT:
        yield Advice(
            "trainer_waits",
            "bad",
            f"The trainer waits {wait:.0%} of the time for rollouts, and the engine samples "
            f"{account.sampling_share:.0%} of it. {_faster_rollouts(rows, settings)}",
        )
    elif wait < SHORT_WAIT:
        text = (
            f"The trainer is the bottleneck: it waits {wait:.0%} of the time, and "
            f"{account.share('forward and backward'):.0%} is forward and backward. "
            f"{_faster_training(settings)}"
        )
        yield Advice("trainer_bound", "hint", text)
        lag = _mean(rows, "lag/mean")
        if lag_bound and lag > 0.7 * lag_bound:
            yield Advice(
                "old_tokens",
                "hint",
                f"Tokens are {lag:.1f} versions old in the mean, of at most {lag_bound}, while "
                "the trainer hardly waits: lower max_head_lag or max_concurrent, and they get "
                "fresher at the same speed.",
            )
    if floor >= 0.9:
        yield Advice(
            "near_floor",
            "good",
            f"Sampling and training overlap: steps are at {floor:.0%} of the floor that the "
            "slower of the two sets.",
        )
    elif lag_bound != 0 and floor < LOW_FLOOR:
        yield Advice(
            "gaps",
            "bad",
            f"Steps reach {floor:.0%} of the floor: neither side is busy all the time. Larger "
            "max_head_lag or max_concurrent, or rollouts of more equal lengths, close the gaps.",
        )


def _faster_rollouts(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    most = _setting(settings, "rollout", "max_concurrent", None)
    running = _mean(rows, "rollout/running")
    if reward_share(rows[-1]) > 0.3:
        return (
            f"Rewards are {reward_share(rows[-1]):.0%} of a rollout: give them processes with "
            "reward_workers, or make them cheaper."
        )
    if most is not None and running >= 0.8 * most:
        return (
            f"All of max_concurrent={most} groups run: raise it if the engine has memory left, or "
            "add a replica."
        )
    if most is not None:
        return (
            f"Only {running:.0f} of max_concurrent={most} groups run in the mean: the bound on "
            "staleness holds rollouts back. Raise max_head_lag, or add a replica."
        )
    return "Raise max_concurrent or add a replica."


def _faster_training(settings: Mapping[str, Any]) -> str:
    minibatches = _setting(settings, "update", "num_minibatches", 1)
    epochs = _setting(settings, "update", "num_epochs", 1)
    if minibatches * epochs > 1 and _setting(settings, "loss", "proximal", "") == "recompute":
        return (
            f"With {minibatches * epochs} optimizer steps a batch it scores every batch once more "
            "before them: proximal='loglinear' leaves that out, and so does one step a batch."
        )
    return "A larger micro-batch, another device or fewer trained layers make it faster."


def _overheads(account: Account, settings: Mapping[str, Any]) -> Iterator[Advice]:
    for label, remedy in (
        (
            "publishing weights",
            "Use another transport, train fewer layers, or take larger batches.",
        ),
        ("scoring", "segment_proximal='loglinear' or trust_region='behavior' need no scoring."),
        ("evaluating", "Validate less often (val_check_interval), or on fewer rows."),
        (REST, "Look at checkpoints, loggers and callbacks: they run between two steps."),
    ):
        if account.share(label) > MUCH:
            said = "neither" if label == REST else label
            text = f"{account.share(label):.0%} of the time is {said}. {remedy}"
            if label == REST:
                text = f"{account.share(label):.0%} of the time is in no phase. {remedy}"
            yield Advice(f"much_{label.split()[-1]}", "bad", text)


def _rollouts(rows: Sequence[Row], settings: Mapping[str, Any]) -> Iterator[Advice]:
    last = rows[-1]
    consumed = len(rows) * _setting(settings, "rollout", "batch_size", 0)
    stale, overdue = last.get("rollout/dropped_stale", 0), last.get("rollout/dropped_overdue", 0)
    ended = consumed + stale + overdue
    if ended and (stale + overdue) / ended > DROPS:
        yield Advice(
            "many_dropped",
            "bad",
            f"{(stale + overdue) / ended:.0%} of the groups were dropped as too old ({stale:.0f} "
            f"while they waited, {overdue:.0f} while they ran). Dropped ones had "
            f"{last.get('rollout/dropped_length', 0):.0f} tokens in the mean, trained ones "
            f"{last.get('rollout/trained_length', 0):.0f}: training is biased against long "
            "rollouts. Raise max_head_lag, lower max_concurrent, or use on_overdue='wait'.",
        )
    for name, why in (("rejected", "the workflow returned nothing"), ("failed", "it raised")):
        count = last.get(f"rollout/{name}", 0)
        if count and count > DROPS * (consumed + count):
            text = f"{count:.0f} groups were {name}: {why}. Look at the reasons below and the log."
            yield Advice(f"many_{name}", "bad", text)


def _learning(rows: Sequence[Row]) -> Iterator[Advice]:
    rewards = [row["train/reward"] for row in rows if "train/reward" in row]
    if len(rewards) >= FLAT and max(rewards[-FLAT:]) == min(rewards[-FLAT:]):
        yield Advice(
            "flat_reward",
            "bad",
            f"The reward was {rewards[-1]:.3g} in each of the last {FLAT} batches: if groups "
            "agree within themselves, too, nothing is learned. Look at the trajectories below.",
        )
    uniform = _mean(rows[len(rows) // 2 :], "train/uniform")
    if uniform > UNIFORM:
        yield Advice(
            "uniform",
            "bad",
            f"In {uniform:.0%} of the groups all rewards are equal, and such a group teaches "
            "nothing: leave them out (ShapedWorkflow with AllEqual), give partial credit, or use "
            "rows that are neither too hard nor done.",
        )
    skipped = _mean(rows, "train/skipped")
    if skipped > 0:
        text = f"{skipped:.1%} of the optimizer steps were skipped: the gradient was not finite."
        yield Advice("skipped", "bad", text)
    truncated = _mean(rows[len(rows) // 2 :], "train/truncated")
    if truncated > 0.3:
        yield Advice(
            "truncated",
            "hint",
            f"{truncated:.0%} of the trajectories end at their token budget: raise max_new_tokens "
            "if their rewards need the end.",
        )


def _mean(rows: Sequence[Row], name: str) -> float:
    """Over batches; a metric of the tokens of one lag over these tokens, as it is 0 without any."""
    lag = name.rpartition("_")[2]
    tokens = f"lag/tokens_{lag}"
    of_lag = lag in LAG_NAMES and not name.startswith("lag/")
    weights = {i: row.get(tokens, 0.0) if of_lag else 1.0 for i, row in enumerate(rows)}
    there = [(weights[i], row[name]) for i, row in enumerate(rows) if name in row]
    total = sum(weight for weight, _ in there)
    return sum(weight * value for weight, value in there) / total if total else 0.0


def _setting(settings: Mapping[str, Any], part: str, name: str, default: Any) -> Any:
    return settings.get(part, {}).get(name, default)
