"""The toy and the real model in one picture: what a method gains against how far policies drift.

A regime is a task with a learning rate, a number of minibatches, a kind of staleness and a lag. Its
drift is that of the default, in nats a version: mean abs(x - b) over its mean lag. A run logs both,
as ``drift/abs_log_mean`` and ``lag/mean``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staleness.methods import DEFAULT
from staleness.plan import Results
from staleness.report import exact, expanded, tables
from staleness.summary import Estimate, Line, Place, Table

COMPARED = {
    "origin": ("#D55E00", "*", "origin (exponent 0)"),
    "proximal": ("#CC79A7", "X", "decoupled"),
    "behavior": ("#009E73", "s", "behavior"),
    "past": ("#882255", "h", "past"),
}


@dataclass(frozen=True)
class Regime:
    """One place of one task, by the drift of the default there.

    Args:
        task: what is learned.
        place: staleness, lag, minibatches, learning rate.
        drift: mean abs(x - b) of the default's tokens, nats.
        mean_lag: of these tokens, versions.
        gains: what methods end above the default, pairs by seed.
    """

    task: str
    place: Place
    drift: float
    mean_lag: float
    gains: dict[str, Estimate]

    @property
    def drift_per_version(self) -> float:
        """Nats a version."""
        return self.drift / self.mean_lag


def regimes_of(lines: Sequence[Line], methods: Sequence[str] = tuple(COMPARED)) -> list[Regime]:
    """The regimes with a lag of 2 or more in which the default ran, by drift per version."""
    found: list[Regime] = []
    for task in dict.fromkeys(line.get("task", "sorting") for line in lines):
        own = [line for line in exact(lines) if line.get("task", "sorting") == task]
        table = Table(expanded(own, (DEFAULT, *methods)))
        for place in table.places:
            drift = table.measure(place, DEFAULT, "abs_drift")
            lag = table.measure(place, DEFAULT, "mean_lag")
            if place.lag < 2 or drift is None or not lag:
                continue
            gains = {name: table.difference(place, name, DEFAULT) for name in methods}
            gains = {name: gain for name, gain in gains.items() if gain is not None}
            found.append(Regime(task, place, drift, lag, gains))
    return sorted(found, key=lambda regime: regime.drift_per_version)


def write(
    real: Results, toy: Path, tables_path: Path, figure: Path, methods: Sequence[str]
) -> None:
    """Write the tables of the real model, a section a task, and the figure of both."""
    lines = real.runs
    if not lines:
        return
    parts = list[str]()
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        probed = [line for line in real.gradients if line["task"] == task]
        parts += [f"# {task[0].upper()}{task[1:]}", tables(own, probed, methods).rstrip()]
    everywhere = regimes_of([*Results(toy).runs, *lines])
    parts += ["# By drift a version, toy and real", "\n".join(_rows(everywhere))]
    tables_path.write_text("\n\n".join(parts) + "\n")
    draw(everywhere, figure)


def _rows(regimes: Sequence[Regime]) -> Iterator[str]:
    names = list(COMPARED)
    yield f"| drift a version, nats | in all | task | place | {' | '.join(names)} |"
    yield "|---|" + "---|" * (3 + len(names))
    for regime in regimes:
        place = regime.place
        where = f"{place.staleness} {place.lag}, {place.minibatches} minibatches, x {place.rate:g}"
        gains = [regime.gains.get(name) for name in names]
        told = ["" if g is None else f"{g.mean:+.3f} ± {g.half:.3f} ({g.count})" for g in gains]
        drift = f"{regime.drift_per_version:.4f} | {regime.drift:.3f}"
        yield f"| {drift} | {regime.task} | {where} | {' | '.join(told)} |"


def draw(regimes: Sequence[Regime], path: Path) -> None:
    """A panel for each lag: gain over the default against drift a version."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lags = sorted({regime.place.lag for regime in regimes})
    size = (4.2 * len(lags), 4.4)
    figure, axes = plt.subplots(
        1, len(lags), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for axis, lag in zip(axes[0], lags, strict=True):
        _panel(axis, [regime for regime in regimes if regime.place.lag == lag])
        axis.set_title(f"{lag} versions old")
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes[0][0].set_ylabel("right at the end, less the default's")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, regimes: Sequence[Regime]) -> None:
    from matplotlib import ticker

    axis.axhline(0, color="#0072B2", linewidth=1.2)
    for name, (color, marker, label) in COMPARED.items():
        for is_toy, kind in ((True, "toy"), (False, "SmolLM2-135M")):
            points = [
                (regime.drift_per_version, regime.gains[name])
                for regime in regimes
                if (regime.task == "sorting") == is_toy and name in regime.gains
            ]
            if points:
                axis.errorbar(
                    [x for x, _ in points], [g.mean for _, g in points],
                    yerr=[g.error for _, g in points], fmt=marker, color=color,
                    markerfacecolor="white" if is_toy else color, label=f"{label}, {kind}",
                    markersize=7, elinewidth=0.8, capsize=2,
                )  # fmt: skip
    axis.set(xscale="log", xlabel="drift a version of the default, nats")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(alpha=0.25)
