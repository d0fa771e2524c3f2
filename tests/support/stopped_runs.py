"""Fits that are told to stop at one moment, and what they leave behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

STOPPED = 3  # the version that is trained on when the signal comes
WAIT_S = 200.0  # a deadline, never a pause


class CallAt(Callback):
    """Calls a function at one hook of one step."""

    def __init__(self, hook: str, function: Callable[[], object], *, step: int = STOPPED) -> None:
        self._hook, self._function, self._step = hook, function, step

    def _call(self, hook: str, trainer: L.Trainer) -> None:
        if hook == self._hook and trainer.global_step == self._step:
            self._function()

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._call("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._call("end", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._call("validation", trainer)


def send(*signums: int) -> Callable[[], None]:
    return lambda: [signal.raise_signal(number) for number in signums] and None


class Run:
    """One process's worth of objects, on one engine that answers at once."""

    def __init__(
        self, model_folder: str, folder: Path, *callbacks: Callback, **settings: Any
    ) -> None:
        self.sync = sdp.WeightSyncCallback(**settings.pop("sync", {}))
        self.recorder, self.engine = Recorder(), settings.pop("engine", FakeEngine())
        rows = make_rows(40)
        data = {"val_prompts": None, "max_head_lag": 1} | settings.pop("data", {})
        self.data = make_data(rows=rows, engine=self.engine, **data)
        self.module = make_module(model_folder)
        settings = {"max_steps": 8, "enable_checkpointing": True} | settings
        if settings["enable_checkpointing"]:
            callbacks = (*callbacks, ModelCheckpoint(folder, every_n_train_steps=10**6))
        self.trainer = make_trainer(
            self.sync, self.recorder, *callbacks, default_root_dir=folder, **settings
        )

    def fit(self, **settings: Any) -> None:
        self.trainer.fit(self.module, self.data, weights_only=True, **settings)

    @property
    def rows(self) -> list[str]:
        return [row for step in self.recorder.steps for row in step.row_ids]


def saved_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ckpt"))


CODES = {signal.SIGINT: 1, signal.SIGTERM: 128 + signal.SIGTERM}


def fail() -> None:
    raise ZeroDivisionError("here")


class Validations(Callback):
    """The versions that were evaluated, with what was logged."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics.items()
        self.found.append({k: float(v) for k, v in metrics if k.startswith("val/")})

    @property
    def versions(self) -> list[float]:
        return [metrics["val/version"] for metrics in self.found]
