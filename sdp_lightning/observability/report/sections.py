"""The parts of a report's page, each made of the metrics of a run; empty where there are none."""

from __future__ import annotations

from collections.abc import Sequence

from sdp_lightning.observability.report.charts import (
    WIDE,
    Line,
    Point,
    area_chart,
    line_chart,
    number,
)
from sdp_lightning.observability.report.files import VERSION, Run
from sdp_lightning.observability.report.markup import card, duration, escape, section, table, value
from sdp_lightning.observability.report.time_breakdown import Account, Row, account_of, reward_share
from sdp_lightning.training.metrics.names import LAG_NAMES

WINDOW = 5  # batches in a moving mean
X = "policy version"
LAG_COLORS = dict(zip(LAG_NAMES, (2, 0, 4, 1, 3), strict=True))
PHASE_COLORS = {
    "wait for samples": 1,
    "wait for tools": 3,
    "wait for rewards": 4,
    "scoring": 5,
    "forward and backward": 0,
    "publishing weights": 2,
    "evaluating": 3,
    "the rest": 6,
}


def points(rows: Sequence[Row], name: str, key: str = VERSION) -> list[Point]:
    """A metric over policy versions."""
    return [(row[key], row[name]) for row in rows if name in row and key in row]


def moving(series: Sequence[Point], window: int = WINDOW) -> list[Point]:
    """Means of the last ``window`` values; at the beginning of those that there are."""
    means: list[Point] = []
    for end in range(1, len(series) + 1):
        last = series[max(0, end - window) : end]
        means.append((series[end - 1][0], sum(y for _, y in last) / len(last)))
    return means


def window_mean(rows: Sequence[Row], name: str) -> float | None:
    """Of the last batches; None if it was not logged."""
    found = points(rows, name)
    return moving(found)[-1][1] if found else None


# Parts --------------------------------------------------------------------------------------------


def cards(run: Run, account: Account | None) -> str:
    """What one looks at first."""
    rows = run.steps
    shown: list[tuple[str, str]] = []
    if rewards := moving(points(rows, "train/reward")):
        first, last = rewards[min(WINDOW, len(rewards)) - 1][1], rewards[-1][1]
        text = value("reward.last", last, f"{last:.3f}")
        shown.append((text, f"reward, from {first:.3f} (means of {WINDOW} batches)"))
    if evaluated := points(run.evaluations, "val/reward", "val/version"):
        version, reward = evaluated[-1]
        text = value("val.last", reward, f"{reward:.3f}")
        shown.append((text, f"validation reward at version {version:.0f}"))
    if account is not None:
        step = account.total_s / account.num_steps
        shown.append((value("step.mean", step, duration(step)), "a step"))
        wait = account.wait_share
        shown.append((value("wait.share", wait, f"{wait:.0%}"), "of it the trainer waits"))
        floor = account.floor_share
        shown.append((value("floor.share", floor, f"{floor:.0%}"), "of the floor is reached"))
    if (lag := window_mean(rows, "lag/mean")) is not None:
        shown.append((value("lag.mean", lag, f"{lag:.2f}"), "versions old is a token, lately"))
    for side, label in (("generated", "tokens/s sampled"), ("train", "tokens/s trained on")):
        if (speed := window_mean(rows, f"speed/{side}_tokens_per_s")) is not None:
            shown.append((value(f"speed.{side}", speed, f"{speed:,.0f}"), f"{label}, lately"))
    boxes = "".join(f'<div class="card"><b>{b}</b><span>{escape(s)}</span></div>' for b, s in shown)
    return f'<div class="cards">{boxes}</div>'


def rewards(run: Run) -> str:
    """Reward of batches and of evaluations."""
    batch = points(run.steps, "train/reward")
    chart = line_chart(
        [
            Line("batch", batch, 0, "faint"),
            Line(f"mean of {WINDOW} batches", moving(batch), 0),
            Line("validation", points(run.evaluations, "val/reward", "val/version"), 1, "marks"),
            Line("pass at k", points(run.evaluations, "val/pass_at_k", "val/version"), 2, "marks"),
        ],
        name="Reward of batches and of evaluations",
        width=WIDE,
        x_label=X,
        y_label="reward",
    )
    return section("reward", "Reward", f'<div class="card">{chart}</div>')


def times(run: Run, account: Account | None) -> str:
    """Where the time went."""
    if account is None:
        return ""
    present = {label: s for label, s in account.phases.items() if s > 0 or label == "the rest"}
    bar = "".join(
        f'<i class="c{PHASE_COLORS[label]}" style="flex-grow:{account.share(label):.6f}" '
        f'title="{escape(label)} {account.share(label):.1%}"></i>'
        for label in present
    )
    rows = [
        [
            ("", f'<i class="key c{PHASE_COLORS[label]}"></i>{escape(label)}'),
            ("n", value(f"phase.{label}", account.share(label), f"{account.share(label):.1%}")),
            ("n", escape(duration(seconds / account.num_steps))),
            ("n", escape(duration(seconds))),
        ]
        for label, seconds in present.items()
    ]
    total = sum(account.share(label) for label in account.phases)
    step = account.total_s / account.num_steps
    rows.append(
        [
            ("", "all"),
            ("n", value("phase.all", total, f"{total:.1%}")),
            ("n", escape(duration(step))),
            ("n", escape(duration(account.total_s))),
        ]
    )
    body = table(["", "#share", "#a step", "#in all"], rows, last_is_sum=True)
    left = card("The trainer's time", f'<div class="bar">{bar}</div>{body}', _waits(run.steps[-1]))
    right = card("Over the run", _phase_chart(run.steps), "seconds of each step")
    return section("time", "Where the time goes", f'<div class="grid2">{left}{right}</div>') + (
        section("floor", "How far from the floor", card("", _floor(account)))
    )


def _waits(row: Row) -> str:
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


def _phase_chart(rows: Sequence[Row]) -> str:
    accounts = [(row[VERSION], account_of([row])) for row in rows if VERSION in row]
    known = [(x, account) for x, account in accounts if account is not None]
    labels = [
        label
        for label in PHASE_COLORS
        if any(account.phases.get(label, 0.0) > 1e-4 * account.total_s for _, account in known)
    ]
    layers = [
        Line(label, [(x, a.phases.get(label, 0.0)) for x, a in known], PHASE_COLORS[label])
        for label in labels
    ]
    return area_chart(
        layers, name="Seconds of each phase", x_label=X, y_label="seconds", percent=False
    )


def _floor(account: Account) -> str:
    training = account.phases["scoring"] + account.phases["forward and backward"]
    steps, step = account.num_steps, account.total_s / account.num_steps
    sampled = max(0.0, account.sampling_s - account.phases["evaluating"])
    floor = account.floor_s / steps
    return (
        "<p>If sampling and training overlapped without a gap, a step would take the longer of "
        f"sampling ({duration(sampled / steps)} in which at least one request ran) and scoring "
        f"plus training ({duration(training / steps)}), plus what is exposed of publishes and "
        f"evaluations: <b>{value('floor.s', floor, duration(floor))}</b>. It takes "
        f"<b>{value('step.s', step, duration(step))}</b>, so this run reaches "
        f"<b>{account.floor_share:.0%}</b> of that floor. The floor moves with the speed that "
        "sampling has: a faster engine or more requests at once lower it.</p>"
    )


def lags(run: Run) -> str:
    """How old the tokens were, and what the loss did to those of each age."""
    rows = run.steps
    used = [lag for lag in LAG_NAMES if any(row.get(f"lag/tokens_{lag}", 0) > 0 for row in rows)]
    if not used:
        return ""
    shares = area_chart(
        [Line(_lag(lag), points(rows, f"lag/share_{lag}"), LAG_COLORS[lag]) for lag in used],
        name="Share of tokens by lag",
        x_label=X,
        y_label="share of tokens",
    )
    parts = [card("How old tokens are", shares, "share of the tokens of a batch by their lag")]
    for title, name, label, sub, end in (
        ("Effective sample size", "ess/token", "share", "1 is on-policy; low: few tokens rule", 1),
        ("Clipped", "clip", "share of kept tokens", "tokens that teach nothing", None),
        ("Bridge", "bridge/abs_log_mean", "nats", "abs(x - q): how far the policy has moved", None),
    ):
        lines = [
            Line(_lag(lag), _of_lag(rows, name, lag), LAG_COLORS[lag], ("line", "dashed")[i % 2])
            for i, lag in enumerate(used)
        ]
        if any(line.points for line in lines):
            low = None if end else 0.0
            chart = line_chart(
                *([line for line in lines if line.points],),
                name=title,
                x_label=X,
                y_label=label,
                y_range=(low, end),
            )
            parts.append(card(title, chart, sub))
    body = f'<div class="grid2">{"".join(parts)}</div>'
    return section("lag", "Staleness", body + card("Over all batches", _lag_table(rows, used)))


def _lag(lag: str) -> str:
    return f"lag {lag.replace('plus', ' or more')}"


def _of_lag(rows: Sequence[Row], name: str, lag: str) -> list[Point]:
    there = [row for row in rows if row.get(f"lag/tokens_{lag}", 0) > 0]
    if name != "clip":
        return points(there, f"{name}_{lag}")
    high = points(there, f"loss/clip_fraction_high_{lag}")
    low = points(there, f"loss/clip_fraction_low_{lag}")
    return [(x, a + b) for (x, a), (_, b) in zip(high, low, strict=False)]


def _lag_table(rows: Sequence[Row], used: Sequence[str]) -> str:
    total = sum(row.get(f"lag/tokens_{lag}", 0.0) for row in rows for lag in used)
    lines: list[list[tuple[str, str]]] = []
    for lag in used:
        tokens = {row[VERSION]: row.get(f"lag/tokens_{lag}", 0.0) for row in rows if VERSION in row}
        count = sum(tokens.values())
        cells = [
            ("", escape(_lag(lag))),
            ("n", value(f"lag.{lag}.share", count / total, f"{count / total:.1%}")),
        ]
        for name in (
            *("ess/token", "clip", "loss/rejected_fraction"),
            *("weight/abs_log_mean", "drift/abs_log_mean", "bridge/abs_log_mean"),
        ):
            found = _of_lag(rows, name, lag)
            if found and count:
                mean = sum(y * tokens[x] for x, y in found) / count
                cells.append(("n", value(f"lag.{lag}.{name}", mean, number(mean))))
            else:
                cells.append(("n", ""))
        lines.append(cells)
    head = ["", "#tokens", "#ESS", "#clipped", "#rejected", "#log weight", "#drift", "#bridge"]
    return table(head, lines)
