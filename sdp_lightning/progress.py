"""A progress bar that says what a user of asynchronous RL wants to know."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

_SHOWN = {
    "reward": "train/reward",
    "lag": "lag/mean",
    "running": "rollout/running",
    "pending": "rollout/pending",
    "wait_s": "time/wait_s",
}


class RolloutProgressBar(TQDMProgressBar):
    """One line: batches done, time, reward, mean lag, groups running and pending, last wait."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("Training")

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        found = trainer.callback_metrics
        return {name: f"{float(found[key]):.3g}" for name, key in _SHOWN.items() if key in found}
