"""Sections of the report page about key numbers, time and staleness: pure functions of metrics.

A section without metrics is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sdp_lightning.observability.report.charts import Line, area_chart, line_chart, number
from sdp_lightning.observability.report.files import VERSION, Run
from sdp_lightning.observability.report.markup import (
    Cell,
    card,
    duration,
    escape,
    section,
    table,
    value,
)
from sdp_lightning.observability.report.series import (
    CLIPPED,
    WINDOW,
    lag_label,
    lag_mean,
    lag_points,
    lag_tokens,
    moving_mean,
    token_points,
    values_of,
    when_of,
    window_mean,
)
from sdp_lightning.observability.report.time_breakdown import (
    REST,
    TimeBreakdown,
    reward_share,
    time_breakdown,
)
from sdp_lightning.training.metrics.names import LAG_NAMES, MetricRow

LAG_COLORS = dict(zip(LAG_NAMES, (2, 0, 4, 1, 3), strict=True))
PHASE_COLORS = {
    "wait for samples": 1,
    "wait for tools": 3,
    "wait for rewards": 4,
    "scoring": 5,
    "forward and backward": 0,
    "publishing weights": 2,
    "evaluating": 3,
    REST: 6,
}


def cards(run: Run, breakdown: TimeBreakdown | None) -> str:
    """Cards with the most important numbers, each a sentence around its number."""
    rows = run.steps
    boxes: list[str] = []

    def show(key: str, number: float, before: str, text: str, after: str) -> None:
        shown = f"<span>{before}</span> <b>{value(key, number, text)}</b> <span>{after}</span>"
        boxes.append(f'<div class="card">{shown}</div>')

    if rewards := moving_mean(values_of(rows, "train/reward")):
        first, last = rewards[min(WINDOW, len(rewards)) - 1], rewards[-1]
        after = f"lately; it was {first:.3f} at first (means of {WINDOW} batches)"
        show("reward.last", last, "the reward is", f"{last:.3f}", after)
    if evaluated := [row for row in run.evaluations if "val/reward" in row]:
        first, last = evaluated[0]["val/reward"], evaluated[-1]["val/reward"]
        after = when_of(evaluated[-1], rows)
        if len(evaluated) > 1:
            after += f"; it was {first:.3f} {when_of(evaluated[0], rows)}"
        show("val.last", last, "validation gives", f"{last:.3f}", after)
    if breakdown is not None:
        step = breakdown.step_s
        wait, floor = breakdown.wait_share, breakdown.floor_share
        show("step.mean", step, "a step takes", duration(step), "in the mean")
        show("wait.share", wait, "the trainer waits", f"{wait:.0%}", "of a step")
        after = "of its time, if sampling and training overlapped without a gap"
        show("floor.share", floor, "a step would take", f"{floor:.0%}", after)
    if (lag := window_mean(rows, "lag/mean")) is not None:
        after = f"version{'' if f'{lag:.2f}' == '1.00' else 's'} old lately, in the mean"
        show("lag.mean", lag, "tokens are", f"{lag:.2f}", after)
    for side, before in (("generated", "the engine samples"), ("train", "the trainer trains on")):
        if (speed := window_mean(rows, f"speed/{side}_tokens_per_s")) is not None:
            show(f"speed.{side}", speed, before, f"{speed:,.0f}", "tokens/s lately")
    return f'<div class="cards">{"".join(boxes)}</div>'


def times(run: Run, breakdown: TimeBreakdown | None) -> str:
    """Shares of the phases, in all and over the run, and the distance from the floor."""
    if breakdown is None:
        return ""
    present = {label: s for label, s in breakdown.phases.items() if s > 0 or label == REST}
    bar = "".join(
        f'<i class="c{PHASE_COLORS[label]}" style="flex-grow:{breakdown.share(label):.6f}" '
        f'title="{escape(label)} {breakdown.share(label):.1%}"></i>'
        for label in present
    )

    def row(label: str, share: float, seconds: float, key: str = "") -> list[Cell]:
        return [
            ("", key + escape(label)),
            ("n", value(f"phase.{label}", share, f"{share:.1%}")),
            ("n", duration(seconds / breakdown.num_steps)),
            ("n", duration(seconds)),
        ]

    rows = [
        row(label, breakdown.share(label), s, f'<i class="key c{PHASE_COLORS[label]}"></i>')
        for label, s in present.items()
    ]
    rows.append(row("all", sum(map(breakdown.share, breakdown.phases)), breakdown.total_s))
    body = table(["", "#share", "#a step", "#in all"], rows, last_is_sum=True)
    left = card("The trainer's time", f'<div class="bar">{bar}</div>{body}', _waits(run.steps[-1]))
    right = card("Over the run", _phase_chart(run.steps), "seconds of each step")
    return section("time", "Where the time goes", f'<div class="grid2">{left}{right}</div>') + (
        section("floor", "How far from the floor", card("", _floor(breakdown)))
    )


def _waits(row: MetricRow) -> str:
    took = [
        f"{duration(row[f'rollout_time/{part}_s'])} {what}"
        for part, what in (("sample", "sampling"), ("tool", "tools"), ("reward", "reward"))
        if row.get(f"rollout_time/{part}_s", 0.0) > 0
    ]
    if not took:
        return ""
    return (
        f"Rewards run beside sampling, not on the trainer's clock. A trajectory takes "
        f"{', '.join(took)} in the mean ({reward_share(row):.1%} reward); a wait is divided the "
        "same way."
    )


def _phase_chart(rows: Sequence[MetricRow]) -> str:
    steps = [(row[VERSION], time_breakdown([row])) for row in rows if VERSION in row]
    layers = [
        Line(
            label,
            [(x, math.nan if step is None else step.phases.get(label, 0.0)) for x, step in steps],
            color,
        )
        for label, color in PHASE_COLORS.items()
        if any(step is not None and step.share(label) > 1e-4 for _, step in steps)
    ]
    return area_chart(layers, name="Seconds of each phase", y_label="seconds", percent=False)


def _floor(breakdown: TimeBreakdown) -> str:
    training = breakdown.phases["scoring"] + breakdown.phases["forward and backward"]
    steps, step = breakdown.num_steps, breakdown.step_s
    sampled = max(0.0, breakdown.sampling_s - breakdown.phases["evaluating"])
    floor = breakdown.floor_s / steps
    return (
        "<p>If sampling and training overlapped without a gap, a step would take the longer of "
        f"sampling ({duration(sampled / steps)} in which at least one request ran) and scoring "
        f"plus training ({duration(training / steps)}), plus what is exposed of publishes and "
        f"evaluations: <b>{value('floor.s', floor, duration(floor))}</b>. It takes "
        f"<b>{value('step.s', step, duration(step))}</b>, so this run reaches "
        f"<b>{breakdown.floor_share:.0%}</b> of that floor. The floor moves with the speed that "
        f"sampling has. {_tried(breakdown.speeds)}</p>"
    )


def _tried(speeds: Mapping[int, float]) -> str:
    """What the numbers of groups at once that were tried are worth."""
    if len(speeds) < 2:
        return (
            "Only one max_concurrent was measured: a faster engine or another one may lower it, "
            "and max_concurrent=&quot;auto&quot; tries several."
        )
    best = max(speeds, key=lambda setting: speeds[setting])
    tried = ", ".join(
        f"{setting}: {value(f'speed.at.{setting}', speed, f'{speed:,.0f}')}"
        for setting, speed in speeds.items()
    )
    return (
        f"Trained tokens a second by groups at once: {tried}. {best} were the fastest, and the "
        "floor is not above what these tokens take with them."
    )


def lags(run: Run) -> str:
    """Ages of the tokens, and what the loss did to those of each age."""
    rows = run.steps
    used = {lag: count for lag, count in lag_tokens(rows).items() if count}
    if not used:
        return ""
    shares = area_chart(
        [
            Line(lag_label(lag), token_points(rows, f"lag/share_{lag}"), LAG_COLORS[lag])
            for lag in used
        ],
        name="Share of tokens by lag",
        y_label="share of tokens",
    )
    parts = [card("How old tokens are", shares, "share of the tokens of a batch by their lag")]
    for title, name, label, sub, high in (
        ("Effective sample size", "ess/token", "share", "1 is on-policy; low: few tokens rule", 1),
        ("Clipped", CLIPPED, "share of kept tokens", "tokens without a gradient", None),
        ("Bridge", "bridge/abs_log_mean", "nats", "abs(x - q): how far the policy has moved", None),
    ):
        lines = [
            Line(
                *(lag_label(lag), lag_points(rows, name, lag), LAG_COLORS[lag]),
                ("line", "dashed")[index % 2],
            )
            for index, lag in enumerate(used)
        ]
        if any(line.points for line in lines):
            y_range = (None if high else 0.0, high)
            chart = line_chart(lines, name=title, y_label=label, y_range=y_range)
            parts.append(card(title, chart, sub))
    body = f'<div class="grid2">{"".join(parts)}</div>'
    return section("lag", "Staleness", body + card("Over all batches", _lag_table(rows, used)))


def _lag_table(rows: Sequence[MetricRow], used: Mapping[str, float]) -> str:
    lines: list[list[Cell]] = []
    for lag, count in used.items():
        share = count / sum(used.values())
        part = value(f"lag.{lag}.share", share, f"{share:.1%}")
        cells = [("", escape(lag_label(lag))), ("n", part)]
        for name in (
            *("ess/token", CLIPPED, "loss/rejected_fraction"),
            *("weight/abs_log_mean", "drift/abs_log_mean", "bridge/abs_log_mean"),
        ):
            mean = lag_mean(rows, name, lag)
            text = "" if mean is None else value(f"lag.{lag}.{name}", mean, number(mean))
            cells.append(("n", text))
        lines.append(cells)
    head = ["", "#tokens", "#ESS", "#clipped", "#rejected", "#log weight", "#drift", "#bridge"]
    return table(head, lines)
