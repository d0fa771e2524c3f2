"""``max_concurrent="auto"`` in a fit: it is tried, shown, and goes on after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.observability.progress.callback import concurrency_parts, progress_parts
from sdp_lightning.rollout.concurrency import MEASURED, SETTLE, ConcurrencyTuner
from sdp_lightning.testing import FakeEngine
from support.rollouts import rolling
from support.trainers import make_data, make_module, make_trainer

FIRST = SETTLE + MEASURED  # steps until the first setting is measured


class Watcher(Callback):
    """Notes the tuner's state at the start of the fit and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.limits: list[int] = []
        self.metrics: list[float] = []
        self.lines: list[Sequence[str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.note(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.note(trainer)
        self.metrics.append(float(trainer.callback_metrics["rollout/concurrency"]))
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.lines.append([*progress_parts(row, 1, -1, 0.0), *concurrency_parts(trainer)])

    def note(self, trainer: L.Trainer) -> None:
        executor = trainer.datamodule.executor  # type: ignore[attr-defined]
        assert executor.concurrency.tuner is not None
        self.states.append(executor.concurrency.tuner.state_dict())
        self.limits.append(executor.manager.max_concurrent)


def fit(model: str, steps: int, *callbacks: Callback, ckpt: Path | None = None) -> L.Trainer:
    trainer = make_trainer(sdp.WeightSyncCallback(), *callbacks, max_steps=steps)
    data = make_data(batch_size=2, max_head_lag=2, max_concurrent="auto")
    trainer.fit(make_module(model), datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


def test_a_fit_tries_settings_says_why_and_goes_on_after_a_resume(
    model_folder: str, tmp_path: Path
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == FIRST + 1:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    before = Watcher()
    fit(model_folder, FIRST + 1, before, Save())
    assert before.metrics[:FIRST] == [2.0] * FIRST, "a batch at once is the first setting"
    assert before.limits[:FIRST] == [2] * FIRST
    tried = before.limits[FIRST]
    assert tried in (1, 3), "one more, or one less, but not the same"
    assert before.metrics[-1] == tried == before.states[-1]["setting"]
    shown = before.lines[-1]
    assert any(f" of {tried} running" in part for part in shown)
    assert shown[-1].startswith(f"{tried} at once: ") and shown[-1].endswith("at 2")
    after = Watcher()
    fit(model_folder, FIRST + 2, after, ckpt=tmp_path / "at.ckpt")
    assert after.states[0] == before.states[-1] and after.limits[0] == tried
    assert after.states[1] != after.states[0], "its first step counts"


def test_on_policy_runs_and_fixed_settings_have_no_tuner() -> None:
    for settings, limit in (
        ({"max_head_lag": 0, "max_concurrent": "auto"}, 2),
        ({"max_head_lag": 2, "max_concurrent": 5}, 5),
        ({"max_head_lag": 2}, 6),
    ):
        with rolling(FakeEngine(), batch_size=2, start=False, **settings) as executor:
            assert executor.concurrency.tuner is None
            assert executor.concurrency.on_step({}) == {}
            assert executor.concurrency.state_dict() == {}
            assert executor.manager.max_concurrent == limit


def test_the_bound_of_the_ledger_is_the_largest_setting() -> None:
    config = sdp.RolloutConfig(batch_size=4, max_head_lag=3, max_concurrent="auto")
    assert ConcurrencyTuner(bound=config.concurrency, start=4).settings == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
    ]
    assert config.share(2).max_concurrent == "auto" and config.share(2).concurrency == 8


@pytest.mark.parametrize("value", ["Auto", "4", 0, True, 2.0, 2**70])
def test_what_is_neither_a_number_nor_auto_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_concurrent must be an integer of at "):
        sdp.RolloutConfig(max_concurrent=value)
