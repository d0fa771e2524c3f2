"""Section of the report page about rollouts: speed, running, lost and slowest groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.observability.report.charts import Line, line_chart
from sdp_lightning.observability.report.files import Run
from sdp_lightning.observability.report.markup import card, duration, escape, section, table, value
from sdp_lightning.observability.report.series import points
from sdp_lightning.training.metrics.names import MetricRow


def rollouts(run: Run) -> str:
    """Speed of both sides, running and ready groups, lost and slowest ones."""
    rows = run.steps
    if not points(rows, "rollout/running"):
        return ""
    sampled = Line("sampled", points(rows, "speed/generated_tokens_per_s"), 1)
    trained = Line("trained on", points(rows, "speed/train_tokens_per_s"), 0)
    running = Line("running", points(rows, "rollout/running"), 1)
    ready = Line("ready", points(rows, "rollout/pending"), 0)
    speed = _chart([sampled, trained], "Tokens per second", "tokens/s")
    groups = _chart([running, ready], "Groups on their way", "groups")
    body = card("Speed", speed) + card("Groups under way", groups, "right after each publish")
    body += card("Lost groups", _losses(rows, run.state))
    body += _errors(rows)
    body += card("Slowest groups", _slowest(run.state), "of the groups that ended, on rank 0")
    return section("rollouts", "Rollouts", f'<div class="grid2">{body}</div>')


def _chart(lines: Sequence[Line], name: str, y_label: str) -> str:
    return line_chart(lines, name=name, y_label=y_label, y_range=(0.0, None))


def _losses(rows: Sequence[MetricRow], state: Mapping[str, Any]) -> str:
    last = rows[-1]
    names = {
        "dropped_stale": "dropped: too old after waiting",
        "dropped_overdue": "dropped: too old while they ran",
        "rejected": "rejected: the workflow returned nothing to train on",
        "failed": "failed: the workflow raised",
        "diverged": "sampled from scratch after a resume",
        "discarded": "of a checkpoint, discarded as the prompts began anew",
    }
    counted = [
        [("", escape(text)), ("n", value(f"lost.{name}", last[f"rollout/{name}"], f"{count:.0f}"))]
        for name, text in names.items()
        if (count := last.get(f"rollout/{name}")) is not None
    ]
    body = table(["", "#groups"], counted)
    trained, dropped = last.get("rollout/trained_length", 0), last.get("rollout/dropped_length", 0)
    if dropped:
        body += (
            f'<p class="sub">A trained group has {trained:,.0f} sampled tokens in the mean, a '
            f"dropped one {dropped:,.0f}.</p>"
        )
    for why, count in state.get("rejections", {}).items():
        body += f'<p class="sub">{count} x rejected because {escape(why)}</p>'
    lines = [
        Line(name.removeprefix("dropped_"), points(rows, f"rollout/{name}"), i, style)
        for i, (name, style) in enumerate(zip(names, ("line", "dashed") * 2, strict=False))
        if last.get(f"rollout/{name}")
    ]
    chart = _chart(lines, "Lost groups so far", "groups so far")
    return body + ("" if "empty" in chart else chart)


def _errors(rows: Sequence[MetricRow]) -> str:
    """Infrastructure errors by cause; empty if there are none."""
    names = [name for name in rows[-1] if name.startswith("rollout/error/")]
    if not names:
        return ""
    labels = {name: name.removeprefix("rollout/error/").replace("_", " ") for name in names}
    counted = [
        [
            ("", escape(label)),
            ("n", value(f"error.{label}", rows[-1][name], f"{rows[-1][name]:.0f}")),
        ]
        for name, label in labels.items()
    ]
    lines = [
        Line(label, points(rows, name), index, ("line", "dashed")[index // 6 % 2])
        for index, (name, label) in enumerate(labels.items())
    ]
    left_out = rows[-1].get("rollout/left_out", 0.0)
    return card(
        "Infrastructure errors",
        table(["cause", "#errors"], counted) + _chart(lines, "Errors so far", "errors so far"),
        f"{left_out:.0f} samples were left out of their groups; the others were tried again",
    )


def _slowest(state: Mapping[str, Any]) -> str:
    records = state.get("slowest", [])
    if not records:
        return '<p class="empty">not recorded</p>'
    rows = [
        [
            ("", f"<code>{escape(r['row_id'])}</code>"),
            ("n", escape(duration(r["seconds"]))),
            ("n", f"{r['num_sampled']:,}"),
            ("n", escape(" to ".join(map(str, dict.fromkeys(r["versions"] or ()))))),
            ("n", escape(duration(r["reward_s"]))),
            ("", escape(r["fate"])),
        ]
        for r in records
    ]
    return table(["row", "#took", "#tokens", "#versions", "#reward", "became"], rows)
