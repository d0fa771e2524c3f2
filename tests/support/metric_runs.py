"""Helpers of the tests of callbacks that only read metrics: a fit that logs given metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar

from sdp_lightning.lightning.known_warnings import ignore_known_warnings

ROWS: list[dict[str, float]] = [
    {
        "train/reward": reward,
        **{
            f"lag/tokens_{lag}": count
            for lag, count in zip("0123", (50.0, 50.0, 0, 0), strict=True)
        },
        "lag/tokens_4plus": 0.0,
        "time/step_s": 2.0,
        "time/wait_s": 0.5,
        "time/train_s": 1.0,
        "rollout/dropped_stale": count,
        "speed/generated_tokens_per_s": 100.0,
        "speed/train_tokens_per_s": 80.0,
    }
    for reward, count in ((0.25, 0.0), (0.75, 1.0), (0.75, 3.0))
]


class Replay(L.LightningModule):
    """Logs the given metrics, step by step, as the callbacks of a real run do."""

    def __init__(self, rows: list[dict[str, float]]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows = rows

    def setup(self, stage: str) -> None:
        ignore_known_warnings(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(self.rows[batch_idx])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/reward", 0.625, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def replay(folder: Path, *callbacks: L.Callback, rows: list[dict[str, float]] = ROWS) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    trainer.fit(Replay(rows), [0] * len(rows), [0])
