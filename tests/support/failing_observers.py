"""Fits with a callback or a logger that fails, and what is said of it."""

from __future__ import annotations

import errno
import os
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.trainers import make_data, make_module, make_trainer


class DiskFull(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


class At(Callback):
    """Calls a function at the start of a batch, of the third one unless told otherwise."""

    def __init__(self, function: Any, batch_idx: int = 2) -> None:
        self._function, self._batch_idx = function, batch_idx

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._batch_idx:
            self._function()


def fail() -> None:
    raise ValueError("the real error, about a completion \ud800")


def nothing() -> None:
    pass


def run(folder: str, *callbacks: Callback, logger: Any = False, rows: Any = None) -> L.Trainer:
    engine = FakeEngine()
    data = make_data(engine=engine, rows=rows, max_head_lag=1)
    trainer = make_trainer(
        *(sdp.WeightSyncCallback(failing_callbacks="raise"), *callbacks),
        logger=logger,
        max_steps=4,
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    try:
        trainer.fit(make_module(folder), data)
    finally:
        with pytest.raises(sdp.EngineError, match="closed"):
            engine.update_weights([], 99, reset=True)
    return trainer


def set_aside(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(f"{name} failed and is set aside: " in r.getMessage() for r in caplog.records)


class Avenger(Callback):
    """Raises when it hears of an error."""

    def on_exception(self, *args: Any) -> None:
        raise LookupError("an error about an error")
