"""What a run has been: a page and a plot when it ends.

Reads the Trainer's metrics and nothing else. Times in seconds, rewards as means of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdp_lightning.observability.progress.callback import (
    ProgressLine as ProgressLine,  # where configs look for it, too
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Row = Mapping[str, float]
PHASES = {
    "wait": "waiting for rollouts",
    "score": "scoring",
    "train": "training",
    "publish": "publishing weights",
    "evaluate": "evaluating",
}
DROPS = {
    "rollout/dropped_stale": "dropped (stale)",
    "rollout/dropped_overdue": "dropped (overdue)",
    "rollout/rejected": "rejected",
    "rollout/failed": "failed",
}
LAG_COLUMNS = {  # sums of metrics of a lag
    "ESS": ("ess/token",),
    "clipped": ("loss/clip_fraction_high", "loss/clip_fraction_low"),
    "rejected": ("loss/rejected_fraction",),
    "bridge": ("bridge/abs_log_mean",),
}
SPEEDS = {"generated": "generated", "train": "trained"}


class RunSummary(Callback):
    """Prints what a fit has been when it ends, and writes the plot of its reward.

    Place it after ``WeightSyncCallback``, whose metrics it reads.

    Args:
        window: batches in a moving mean.
        plot: file name of the plot, in the logger's folder; None is none. Needs matplotlib.
        console: where to print; None is the terminal.

    Attributes:
        rows: the metrics of every batch of the last fit.
    """

    def __init__(
        self, window: int = 5, plot: str | None = "reward.png", console: Console | None = None
    ) -> None:
        self.window, self.plot = window, plot
        self.rows: list[dict[str, float]] = []
        self._console = console

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.rows.append({k: float(value) for k, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if not trainer.is_global_zero or not self.rows:
            return
        from rich.console import Console

        console = self._console or Console()
        for part in render(self.rows, window=self.window):
            console.print(part)
        if self.plot is not None and self._rewards():
            console.print(write_plot(self._rewards(), folder / self.plot, window=self.window))

    def _rewards(self) -> list[float]:
        return series(self.rows, "train/reward")


def render(rows: Sequence[Row], *, window: int) -> list[RenderableType]:
    """The page: plot, reward, lags, time, drops, speed, and what was done to tokens of each lag.

    Parts without metrics are left out.
    """
    from rich.table import Table

    parts: list[RenderableType] = []
    rewards = series(rows, "train/reward")
    if rewards:
        parts.append("\n".join(draw(moving_mean(rewards, window))))
    table = Table.grid(padding=(0, 2))
    if rewards:
        means = moving_mean(rewards, window)
        first = means[min(window, len(means)) - 1]
        text = f"{first:.3f} -> {means[-1]:.3f}, means of the first and last {window} batches"
        table.add_row("reward", "", text)
    for title, shares in (("lag", lag_shares(rows)), ("time", phase_shares(rows))):
        for label, share in shares.items():
            table.add_row(title, f"{share:6.1%}", f"{'█' * round(30 * share):30} {label}")
            title = ""
    counts = {label: series(rows, name) for name, label in DROPS.items()}
    lost = [f"{values[-1]:.0f} {label}" for label, values in counts.items() if values]
    if lost:
        table.add_row("groups", "", ", ".join(lost))
    speeds = {label: series(rows, f"speed/{label}_tokens_per_s") for label in SPEEDS}
    told = [f"{mean(values):.0f} {SPEEDS[label]}" for label, values in speeds.items() if values]
    if told:
        table.add_row("tokens/s", "", ", ".join(told))
    return [*parts, table, *lag_table(rows)]


def series(rows: Sequence[Row], name: str) -> list[float]:
    """The values of one metric, where it was logged."""
    return [row[name] for row in rows if name in row]


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Of the last ``window`` values; at the beginning of those that there are.

    >>> moving_mean([1, 2, 3, 4], 2)
    [1.0, 1.5, 2.5, 3.5]
    """
    return [mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def lag_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of tokens of every lag up to the largest there was, averaged over batches."""
    prefix = "lag/share_"
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    shares = {name.removeprefix(prefix): mean(series(rows, name)) for name in sorted(names)}
    while shares and not shares[last := max(shares)]:
        del shares[last]
    return {
        f"{lag.replace('plus', ' or more')} version{'' if lag == '1' else 's'} old": share
        for lag, share in shares.items()
    }


def lag_table(rows: Sequence[Row]) -> list[RenderableType]:
    """ESS, clipping, rejection and bridge of every lag, over the tokens of all batches."""
    from rich.table import Table

    table = Table("lag", *LAG_COLUMNS, box=None, padding=(0, 2))
    for lag in ("0", "1", "2", "3", "4plus"):
        there = [row for row in rows if row.get(f"lag/tokens_{lag}", 0) > 0]
        if there:
            cells = [_of_lag(there, names, lag) for names in LAG_COLUMNS.values()]
            table.add_row(lag.replace("plus", "+"), *cells)
    return [table] if table.row_count else []


def _of_lag(rows: Sequence[Row], names: tuple[str, ...], lag: str) -> str:
    """The mean over tokens of the sum of some metrics; nothing if none of them was logged."""
    logged = [name for name in names if f"{name}_{lag}" in rows[0]]
    tokens = [row[f"lag/tokens_{lag}"] for row in rows]
    values = [sum(row[f"{name}_{lag}"] for name in logged) for row in rows]
    total = sum(value * count for value, count in zip(values, tokens, strict=True))
    return f"{total / sum(tokens):.3f}" if logged else ""


def phase_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the steps' time spent in every phase, the rest last; they add up to 1."""
    total = sum(series(rows, "time/step_s"))
    if total <= 0:
        return {}
    spent = {label: sum(series(rows, f"time/{name}_s")) for name, label in PHASES.items()}
    total = max(total, sum(spent.values()))
    shares = {label: seconds / total for label, seconds in spent.items()}
    return {**shares, "the rest": 1 - sum(shares.values())}


def draw(values: Sequence[float], *, width: int = 60, height: int = 8) -> list[str]:
    """A plot of text, one column a value or, if there are too many, one for several.

    >>> for line in draw([0.0, 0.5, 1.0], height=3): print(line)
     1.00 ┤  ●
     0.50 ┤ ●
     0.00 ┤●
    """
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    points = [mean(values[a:b]) for a, b in pairwise(edges)]
    low, high = min(points), max(points)
    step = (high - low) / (height - 1) or 1.0
    levels = [round((point - low) / step) for point in points]
    return [
        f"{low + level * step:5.2f} ┤"
        + "".join("●" if at == level else " " for at in levels).rstrip()
        for level in (reversed(range(height)) if high > low else (0,))
    ]


def write_plot(rewards: Sequence[float], path: Path, *, window: int) -> str:
    """Draw the rewards of all batches and their moving mean; returns what to tell the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path} was not drawn: matplotlib is not installed (pip install matplotlib)."
    steps = range(1, len(rewards) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, rewards, "o", alpha=0.35, label="batch")
    axes.plot(steps, moving_mean(rewards, window), "-", label=f"mean of the last {window}")
    axes.set(xlabel="training step", ylabel="reward", title="Reward of the sampled completions")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"The reward is drawn in {path}."
