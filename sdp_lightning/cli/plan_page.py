"""Charts of plans: speed, lag and waste over the number of GPUs that sample, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.observability.report.charts import Line, line_chart
from sdp_lightning.observability.report.markup import card, escape
from sdp_lightning.observability.report.page import document
from sdp_lightning.rollout.simulation.plan import Plan, Plans

_COLORS = 6  # of the style's palette, before the one that marks the best


def write_plan_page(plans: Plans, path: str, title: str) -> None:
    """Write the page to ``path``, in place of what is there.

    Args:
        plans: the simulated plans.
        path: the file.
        title: heading of the page.
    """
    charts = [
        _chart(plans, "Tokens trained a second", lambda plan: plan.summary.tokens_per_s),
        _chart(plans, "Mean lag of trained tokens, versions", lambda plan: plan.summary.mean_lag),
        _chart(plans, "Sampled tokens dropped", lambda plan: plan.summary.dropped_share, True),
        _chart(plans, "Trainer waits", lambda plan: plan.summary.wait_share, True),
    ]
    body = f"<header><h1>{escape(title)}</h1></header>{''.join(charts)}"
    with atomic_file(Path(path)) as file:
        file.write(document(escape(title), body).encode())


def _chart(plans: Plans, title: str, value: Callable[[Plan], float], percent: bool = False) -> str:
    by_concurrency: dict[int, list[Plan]] = {}
    for plan in sorted(plans.plans, key=lambda plan: (plan.max_concurrent, plan.sample_gpus)):
        by_concurrency.setdefault(plan.max_concurrent, []).append(plan)
    lines = [
        Line(
            f"{groups} groups at once",
            _points(each, value),
            color=number % _COLORS,
            style="line" if number < _COLORS else "dashed",
        )
        for number, (groups, each) in enumerate(by_concurrency.items())
    ]
    best = Line("the best", _points([plans.best], value), color=_COLORS, style="marks")
    chart = line_chart(
        [*lines, best],
        name=title,
        y_label=title,
        x_label="GPUs that sample",
        y_range=(0.0, None),
        percent=percent,
    )
    return card(title, chart)


def _points(plans: Sequence[Plan], value: Callable[[Plan], float]) -> list[tuple[float, float]]:
    return [(float(plan.sample_gpus), value(plan)) for plan in plans]
