"""Evaluations of a fit, and the one before its first step, for the summary and the report."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from sdp_lightning.training.metrics.names import MetricRow


class Evaluations:
    """Metrics of the evaluations of a fit, in their order.

    The one before training is that of ``trainer.validate`` with the module and the data of the fit
    that follows, or a sanity check of all validation batches. It is of the version that the fit
    begins with: another one is of other weights, as when the fit resumes a checkpoint.

    Attributes:
        rows: metrics ``val/...`` of each, the one before training first.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._before: tuple[Any, Any, dict[str, float]] | None = None
        self._is_begun = False

    def begin(self) -> None:
        """Forget those of another fit: a fit starts."""
        self.rows, self._is_begun = [], False

    def see(self, trainer: Trainer, module: LightningModule) -> MetricRow | None:
        """Take in an evaluation that has ended; returns its metrics if it is one of the fit's."""
        metrics = trainer.callback_metrics
        row = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
        if self._is_begun and trainer.state.fn == "fit":
            self.rows.append(row)
            return row
        if not trainer.sanity_checking or trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._before = (module, _data(trainer), row)
        return None

    def step(self, trainer: Trainer, module: LightningModule) -> MetricRow | None:
        """Called after each step; after the first returns the evaluation before it, if any."""
        if self._is_begun:
            return None
        self._is_begun = True
        kept, self._before = self._before, None
        if kept is None or kept[0] is not module or kept[1] is not _data(trainer):
            return None
        row, after = kept[2], trainer.callback_metrics.get("rollout/version")
        if after is not None and row.get("val/version") != float(after) - 1:
            return None
        self.rows.insert(0, row)
        return row

    def let_go(self) -> None:
        """Forget all: the run is over."""
        self._before = None
        self.begin()


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
