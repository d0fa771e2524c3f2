"""Summary of a run in the terminal when it ends, with a plot of its reward.

Reads the Trainer's metrics and nothing else. Times in seconds, rewards as means of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from sdp_lightning.lightning.observer import Observer
from sdp_lightning.observability.evaluations import Evaluations
from sdp_lightning.observability.progress.callback import (
    ProgressLine as ProgressLine,  # configs name it here, too
)
from sdp_lightning.observability.report.series import (
    CLIPPED,
    lag_mean,
    lag_tokens,
    mean,
    moving_mean,
    values_of,
    when_of,
)
from sdp_lightning.observability.report.time_breakdown import LABELS, REST, time_breakdown
from sdp_lightning.training.metrics.names import (
    NAMED_EVALUATION,
    NAMED_REWARD,
    MetricRow,
    reward_names,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LOST = {
    "rollout/dropped_stale": "dropped (stale)",
    "rollout/dropped_overdue": "dropped (overdue)",
    "rollout/rejected": "rejected",
    "rollout/failed": "failed",
}
LAG_COLUMNS = {
    "ESS": "ess/token",
    "clipped": CLIPPED,
    "rejected": "loss/rejected_fraction",
    "bridge": "bridge/abs_log_mean",
}
SPEEDS = {
    "speed/generated_tokens_per_s": "generated",
    "speed/train_tokens_per_s": "trained",
}


class RunSummary(Observer):
    """Prints a summary of the fit when it ends, and writes a plot of its reward.

    Place it after ``WeightSyncCallback``, whose metrics it reads.

    Args:
        window: batches in a moving mean.
        plot: file name of the plot in the logger's folder; None writes none. Needs matplotlib.
        console: rich console to print on; None is the terminal.

    Attributes:
        rows: the metrics of every batch of the last fit.
    """

    lost = "the summary of the run"

    def __init__(
        self, window: int = 5, plot: str | None = "reward.png", console: Console | None = None
    ) -> None:
        self.window, self.plot = window, plot
        self.rows: list[dict[str, float]] = []
        self._evaluations = Evaluations()
        self._console = console

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = []
        self._evaluations.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._evaluations.step(trainer, pl_module)
        if trainer.is_global_zero:
            self.rows.append({k: float(value) for k, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.see(trainer, pl_module)

    def let_go(self) -> None:
        self.rows = []
        self._evaluations.let_go()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        if not trainer.is_global_zero or not self.rows:
            return
        from rich.console import Console

        console = self._console or Console()
        for part in render(self.rows, self._evaluations.rows, window=self.window):
            console.print(part)
        rewards = values_of(self.rows, "train/reward")
        if self.plot is not None and rewards:
            console.print(write_plot(rewards, folder / self.plot, window=self.window))


def render(
    rows: Sequence[MetricRow], evaluations: Sequence[MetricRow] = (), *, window: int
) -> list[RenderableType]:
    """The summary: plot, reward, validation, lags, time, lost groups, speed, and each lag.

    Parts without metrics are left out.

    Args:
        rows: metrics of every step.
        evaluations: metrics of every evaluation; the first may be one before training.
        window: batches in a moving mean.
    """
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    table = Table.grid(padding=(0, 2))
    if rewards := values_of(rows, "train/reward"):
        parts.append("\n".join(draw(moving_mean(rewards, window))))
        text = f"{_change(rewards, window)}, means of the first and last {window} batches"
        table.add_row("reward", "", text)
    for name in reward_names(rows):
        values = values_of(rows, NAMED_REWARD + name)
        table.add_row("", "", Text(f"{_change(values, window)} {name}"))
    for title, text in validation_lines(rows, evaluations):
        table.add_row(title, "", Text(text))
    for title, shares in (("lag", lag_shares(rows)), ("time", phase_shares(rows))):
        for label, share in shares.items():
            table.add_row(title, f"{share:6.1%}", f"{'█' * round(30 * share):30} {label}")
            title = ""
    counts = {label: values_of(rows, name) for name, label in LOST.items()}
    if lost := [f"{values[-1]:.0f} {label}" for label, values in counts.items() if values]:
        table.add_row("groups", "", ", ".join(lost))
    if any(left_out := values_of(rows, "rollout/left_out")[-1:]):
        table.add_row("samples", "", f"{left_out[0]:.0f} left out: infrastructure failed")
    logged = [name for name in SPEEDS if values_of(rows, name)]
    if logged:
        speeds = [f"{mean(rows, name):.0f} {SPEEDS[name]}" for name in logged]
        table.add_row("tokens/s", "", ", ".join(speeds))
    return [*parts, table, *lag_table(rows)]


def validation_lines(
    rows: Sequence[MetricRow], evaluations: Sequence[MetricRow]
) -> list[tuple[str, str]]:
    """(title, text) of the first and the last evaluation, then of pass at k and of each reward.

    >>> validation_lines([{"rollout/version": 1}], [{"val/reward": 0.5, "val/version": 0},
    ...                                             {"val/reward": 0.75, "val/version": 1}])
    [('validation', '0.500 -> 0.750, before training and at version 1')]
    """
    evaluations = [row for row in evaluations if "val/version" in row]
    names = {"val/reward": "", "val/pass_at_k": " pass at k"}
    for name in reward_names(evaluations, NAMED_EVALUATION):
        names[NAMED_EVALUATION + name] = f" {name}"
    lines: list[tuple[str, str]] = []
    for name, label in names.items():
        if known := [row for row in evaluations if name in row]:
            ends = [known[0], known[-1]] if len(known) > 1 else known
            text = " -> ".join(f"{row[name]:.3f}" for row in ends) + label
            when = ", " + " and ".join(when_of(row, rows) for row in ends)
            lines.append(("", text) if lines else ("validation", text + when))
    return lines


def _change(values: Sequence[float], window: int) -> str:
    """Means of the first and the last ``window`` values."""
    means = moving_mean(values, window)
    return f"{means[min(window, len(means)) - 1]:.3f} -> {means[-1]:.3f}"


def lag_shares(rows: Sequence[MetricRow]) -> dict[str, float]:
    """Share of the tokens of each lag, up to the largest lag, by its label."""
    counts = lag_tokens(rows)
    return {
        f"{lag.replace('plus', ' or more')} version{'' if lag == '1' else 's'} old": (
            count / sum(counts.values())
        )
        for lag, count in counts.items()
    }


def lag_table(rows: Sequence[MetricRow]) -> list[RenderableType]:
    """ESS, clipping, rejection and bridge of the tokens of each lag; empty without tokens."""
    from rich.table import Table

    table = Table("lag", *LAG_COLUMNS, box=None, padding=(0, 2))
    for lag, count in lag_tokens(rows).items():
        if count:
            means = [lag_mean(rows, name, lag) for name in LAG_COLUMNS.values()]
            cells = ["" if mean is None else f"{mean:.3f}" for mean in means]
            table.add_row(lag.replace("plus", "+"), *cells)
    return [table] if table.row_count else []


def phase_shares(rows: Sequence[MetricRow]) -> dict[str, float]:
    """Share of the steps' time of every phase by its label; they add up to 1."""
    breakdown = time_breakdown(rows)
    if breakdown is None:
        return {}
    labels = (*LABELS.values(), REST)
    return {"waiting for rollouts": breakdown.wait_share} | {
        label: breakdown.share(label) for label in labels
    }


def draw(values: Sequence[float], *, width: int = 60, height: int = 8) -> list[str]:
    """A plot as text: one column for each value, or for several if there are too many.

    >>> for line in draw([0.0, 0.5, 1.0], height=3): print(line)
     1.00 ┤  ●
     0.50 ┤ ●
     0.00 ┤●
    """
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    points = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(points), max(points)
    step = (high - low) / (height - 1) or 1.0
    levels = [round((point - low) / step) for point in points]
    return [
        f"{low + level * step:5.2f} ┤"
        + "".join("●" if at == level else " " for at in levels).rstrip()
        for level in (reversed(range(height)) if high > low else (0,))
    ]


def write_plot(rewards: Sequence[float], path: Path, *, window: int) -> str:
    """Draw the rewards of all batches and their moving mean; returns a message for the user."""
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
