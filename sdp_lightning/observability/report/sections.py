"""Sections of the report page about reward, time and staleness: pure functions of metrics.

A section without metrics is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdp_lightning.observability.report.charts import WIDE, Line, area_chart, line_chart, number
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
    moving,
    points,
    window_mean,
)
from sdp_lightning.observability.report.time_breakdown import (
    REST,
    TimeBreakdown,
    reward_share,
    time_breakdown,
)
from sdp_lightning.training.metrics.names import (
    LAG_NAMES,
    NAMED_EVALUATION,
    NAMED_REWARD,
    MetricRow,
    reward_names,
)

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
    """Cards with the most important numbers."""
    rows = run.steps
    boxes: list[str] = []

    def show(key: str, number: float, text: str, label: str) -> None:
        shown = f"<b>{value(key, number, text)}</b><span>{escape(label)}</span>"
        boxes.append(f'<div class="card">{shown}</div>')

    if rewards := moving(points(rows, "train/reward")):
        first, last = rewards[min(WINDOW, len(rewards)) - 1][1], rewards[-1][1]
        label = f"reward, from {first:.3f} (means of {WINDOW} batches)"
        show("reward.last", last, f"{last:.3f}", label)
    if evaluated := points(run.evaluations, "val/reward", "val/version"):
        version, reward = evaluated[-1]
        show("val.last", reward, f"{reward:.3f}", f"validation reward at version {version:.0f}")
    if breakdown is not None:
        step = breakdown.step_s
        wait, floor = breakdown.wait_share, breakdown.floor_share
        show("step.mean", step, duration(step), "a step")
        show("wait.share", wait, f"{wait:.0%}", "of the time the trainer waits")
        show("floor.share", floor, f"{floor:.0%}", "of the floor is reached")
    if (lag := window_mean(rows, "lag/mean")) is not None:
        show("lag.mean", lag, f"{lag:.2f}", "mean lag lately, in versions")
    for side, label in (("generated", "tokens/s sampled"), ("train", "tokens/s trained on")):
        if (speed := window_mean(rows, f"speed/{side}_tokens_per_s")) is not None:
            show(f"speed.{side}", speed, f"{speed:,.0f}", f"{label}, lately")
    return f'<div class="cards">{"".join(boxes)}</div>'


def rewards(run: Run) -> str:
    """Chart of the reward of batches and of evaluations."""
    batch, key, at = points(run.steps, "train/reward"), NAMED_EVALUATION, "val/version"
    chart = line_chart(
        [
            Line("batch", batch, 0, "faint"),
            Line(f"mean of {WINDOW} batches", moving(batch), 0),
            Line("validation", points(run.evaluations, "val/reward", "val/version"), 1, "marks"),
            Line("pass at k", points(run.evaluations, "val/pass_at_k", "val/version"), 2, "marks"),
        ],
        name="Reward of batches and of evaluations",
        width=WIDE,
        y_label="reward",
    )
    lines = [
        Line(name, moving(points(run.steps, NAMED_REWARD + name)), color % 7)
        for color, name in enumerate(reward_names(run.steps))
    ] + [
        Line(f"{name}, validation", points(run.evaluations, key + name, at), color % 7, "marks")
        for color, name in enumerate(reward_names(run.evaluations, key))
    ]
    body = f'<div class="card">{chart}</div>'
    if lines:
        named = line_chart(lines, name="Each of several rewards", width=WIDE, y_label="reward")
        body += card("Each reward", named, f"means of {WINDOW} batches, unweighted")
    return section("reward", "Reward", body)


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
    known = [(version, step) for version, step in steps if step is not None]
    layers = [
        Line(label, [(x, step.phases.get(label, 0.0)) for x, step in known], color)
        for label, color in PHASE_COLORS.items()
        if any(step.share(label) > 1e-4 for _, step in known)
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
        "sampling has: a faster engine or more requests at once lower it.</p>"
    )


def lags(run: Run) -> str:
    """Ages of the tokens, and what the loss did to those of each age."""
    rows = run.steps
    used = {lag: count for lag, count in lag_tokens(rows).items() if count}
    if not used:
        return ""
    shares = area_chart(
        [Line(lag_label(lag), points(rows, f"lag/share_{lag}"), LAG_COLORS[lag]) for lag in used],
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
