"""Sections of the report page about learning: the reward, and what else tells whether it goes well.

Pure functions of metrics. What a run did not log has no chart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdp_lightning.observability.report.charts import Line, line_chart
from sdp_lightning.observability.report.files import Run
from sdp_lightning.observability.report.markup import card, section
from sdp_lightning.observability.report.series import WINDOW, moving, points, token_points
from sdp_lightning.training.metrics.names import NAMED_EVALUATION, NAMED_REWARD, reward_names


@dataclass(frozen=True)
class Signal:
    """One metric with a chart of its own.

    Args:
        name: logged name.
        title: heading of the chart.
        meaning: text below the heading.
        unit: label of the y axis.
        low: lower end of the y axis; None fits the data.
        percent: whether it is a share of 1.
        is_smooth: whether its values need no moving mean.
        of_tokens: whether it is a mean over tokens, and unknown where a batch has none.
    """

    name: str
    title: str
    meaning: str
    unit: str
    low: float | None = 0.0
    percent: bool = False
    is_smooth: bool = False
    of_tokens: bool = False


SIGNALS = (
    Signal(
        "train/reward_std",
        "Reward spread",
        "standard deviation within a group, mean over groups: at 0 there is nothing to learn from",
        "reward",
    ),
    Signal("loss/entropy", "Entropy", "of the policy, mean over tokens", "nats", of_tokens=True),
    Signal("train/length", "Completion length", "sampled tokens of a trajectory", "tokens"),
    Signal(
        "train/truncated",
        "Truncated completions",
        "share of the trajectories that ended at their token budget",
        "share",
        percent=True,
    ),
    Signal("train/grad_norm", "Gradient norm", "before it is clipped", "norm"),
    Signal("train/kl", "KL", "to the reference model", "nats", low=None, of_tokens=True),
    Signal("train/lr", "Learning rate", "as it was applied", "rate", is_smooth=True),
)


def rewards(run: Run) -> str:
    """Charts of the reward of batches and of evaluations: of all, then of each of several."""
    names = dict.fromkeys(
        [*reward_names(run.steps), *reward_names(run.evaluations, NAMED_EVALUATION)]
    )
    body = card("", _reward_chart(run, "", "Reward of batches and of evaluations"))
    if names:
        each = [card(name, _reward_chart(run, name, f"Reward {name}")) for name in names]
        body += f'<h3 class="part">Each reward, unweighted</h3>{_grid(each)}'
    return section("reward", "Reward", body)


def _reward_chart(run: Run, name: str, title: str) -> str:
    """Batches, their moving mean, and evaluations; ``name`` is empty for the sum of all rewards."""
    batch = points(run.steps, NAMED_REWARD + name if name else "train/reward")
    lead, at = f"{name}, " if name else "", "val/version"
    evaluated = points(run.evaluations, NAMED_EVALUATION + name if name else "val/reward", at)
    passed = [] if name else points(run.evaluations, "val/pass_at_k", at)
    lines = [
        Line(f"{lead}batch", batch, 0, "faint"),
        Line(f"{lead}mean of {WINDOW} batches", moving(batch), 0),
        Line(f"{lead}validation", evaluated, 1, "marks"),
        Line("pass at k", passed, 2, "marks"),
    ]
    return line_chart(lines, name=title, y_label="reward")


def signals(run: Run) -> str:
    """A chart of each of the ``SIGNALS`` that the run logged."""
    charts = [_signal_card(run, signal) for signal in SIGNALS if points(run.steps, signal.name)]
    return section("learning", "Learning", _grid(charts) if charts else "")


def _signal_card(run: Run, signal: Signal) -> str:
    batch = (token_points if signal.of_tokens else points)(run.steps, signal.name)
    lines = (
        [Line(signal.title.lower(), batch)]
        if signal.is_smooth
        else [
            Line("batch", batch, 0, "faint"),
            Line(f"mean of {WINDOW} batches", moving(batch), 0),
        ]
    )
    chart = line_chart(
        lines,
        name=signal.title,
        y_label=signal.unit,
        y_range=(signal.low, None),
        percent=signal.percent,
    )
    bad = sum(not math.isfinite(row.get(signal.name, 0.0)) for row in run.steps)
    note = f"; not finite in {bad} of {len(run.steps)} batches" if bad else ""
    return card(signal.title, chart, signal.meaning + note)


def _grid(cards: list[str]) -> str:
    return f'<div class="grid2">{"".join(cards)}</div>'
