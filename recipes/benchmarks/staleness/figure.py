"""The figure of the ablation: reward against steps, final reward against lag."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from staleness.report import expanded
from staleness.summary import Line, Place, Table, estimate

# Okabe and Ito's colors, with a marker and a dash each: told apart without color, too.
STYLES = {
    "segment": ("#0072B2", "o", "-", "segment (scored)"),
    "segment, log-linear q": ("#56B4E9", "v", "--", "segment, q log-linear"),
    "past": ("#882255", "h", "-.", "past (q, but b at lag 1)"),
    "log-linear q, ESS rate": ("#000000", "^", "--", "q log-linear, rate by ESS"),
    "segment, ESS rate": ("#E69F00", "D", "--", "segment (scored), rate by ESS"),
    "behavior": ("#009E73", "s", "-", "behavior"),
    "behavior, clip 0.3": ("#009E73", "P", ":", "behavior, clip 0.3"),
    "proximal": ("#CC79A7", "X", "-", "decoupled"),
    "origin": ("#D55E00", "*", "-", "origin (exponent 0)"),
    "uncorrected": ("#999999", "x", ":", "uncorrected"),
}


def draw(lines: Sequence[Line], path: Path) -> None:
    """A row of three panels for each number of minibatches; bands and bars are standard errors."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    table = Table(expanded(lines))
    minibatches = sorted({p.minibatches for p in table.places if p.rate == 1}) or [2]
    size = (13, 1 + 3.4 * len(minibatches))
    figure, grid = plt.subplots(
        len(minibatches), 3, figsize=size, layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for axes, number in zip(grid, minibatches, strict=True):
        lag = max((p.lag for p in table.places if p.minibatches == number), default=0)
        _courses(axes[0], table, Place("whole", lag, number))
        for axis, staleness in zip(axes[1:], ("whole", "mixed"), strict=True):
            _against_lag(axis, table, staleness, number)
        for axis in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            axis.set_ylim(0, 0.9)
            axis.grid(alpha=0.25)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _courses(axis: Any, table: Table, place: Place) -> None:
    for method, (color, _, dash, label) in STYLES.items():
        runs = list(table.runs(place, method).values())
        if not runs:
            continue
        steps = runs[0]["steps"]
        columns = list(zip(*(run["success"] for run in runs), strict=True))
        means = [statistics.fmean(column) for column in columns]
        axis.plot(steps, means, dash, color=color, label=label, linewidth=1.8)
        if len(runs) > 1:
            halves = [estimate(column).error for column in columns]
            low = [m - h for m, h in zip(means, halves, strict=True)]
            high = [m + h for m, h in zip(means, halves, strict=True)]
            axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    title = f"whole rollouts {place.lag} versions old, {_count(place.minibatches)}"
    axis.set(title=title, xlabel="training step", ylabel="chance of a right answer")


def _against_lag(axis: Any, table: Table, staleness: str, minibatches: int) -> None:
    of_kind = [p for p in table.places if p.minibatches == minibatches and p.rate == 1]
    lags = sorted({p.lag for p in of_kind if p.staleness == staleness})
    shift = 0.0
    for method, (color, marker, dash, label) in STYLES.items():
        found = [(lag, table.level(Place(staleness, lag, minibatches), method)) for lag in lags]
        points = [(lags.index(lag) + shift, e) for lag, e in found if e is not None]
        shift += 0.025
        if not points:
            continue
        bars = [e.error for _, e in points]
        axis.errorbar(
            [x for x, _ in points], [e.mean for _, e in points], yerr=bars, fmt=marker + dash,
            color=color, label=label, markersize=6, linewidth=1.4, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    axis.set_xticks(range(len(lags)), map(str, lags))
    kind = "whole rollouts" if staleness == "whole" else "segments of several versions"
    axis.set(title=f"{kind}, {_count(minibatches)}", xlabel="lag of the oldest token, versions")


def _count(minibatches: int) -> str:
    return f"{minibatches} minibatch{'es' if minibatches > 1 else ''}"
