"""A pass over the prompts is an epoch of the Trainer, also of a run that is resumed within one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.lightning.prompt_epochs import PromptEpochs
from sdp_lightning.testing import FakeEngine
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")


class Epochs(Callback):
    """Steps at the ends of epochs, and at the validations; may stop the run at a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.ends: list[int] = []
        self.validations: list[int] = []
        self.lengths: list[int] = []
        self._stop = stop

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.lengths.append(int(trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ends.append(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations.append(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == self._stop:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.stop.signum = 2  # as Ctrl-C


class Run:
    """A fit of 10 rows, 4 a batch: passes end within the third, the fifth and the eighth batch."""

    def __init__(
        self,
        folder: str,
        *callbacks: Callback,
        ckpt_path: Path | None = None,
        stop: int | None = None,
        rollout: dict[str, Any] | None = None,
        module: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.recorder, self.epochs = Recorder(), Epochs(stop)
        savers = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        self.trainer = make_trainer(
            sdp.WeightSyncCallback(),
            self.recorder,
            self.epochs,
            *callbacks,
            enable_checkpointing=savers,
            **({"num_sanity_val_steps": 0} | settings),
        )
        sizes: dict[str, Any] = {"batch_size": 4} | (rollout or {})
        rows = make_rows(10)
        data = make_data(rows=rows, engine=FakeEngine(), val_prompts=make_rows(2), **sizes)
        try:
            self.trainer.fit(make_module(folder, **module or {}), data, ckpt_path=ckpt_path)
        except SystemExit:
            assert stop is not None

    @property
    def rows(self) -> list[str]:
        return [row for step in self.recorder.steps for row in step.row_ids]

    @property
    def steps(self) -> int:
        return self.trainer.global_step


def times(rows: list[str]) -> set[int]:
    assert len(set(rows)) == 10
    return set(Counter(rows).values())


def test_max_epochs_are_passes_with_a_validation_and_a_checkpoint_each(
    model_folder: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}-{step}", every_n_epochs=1, save_top_k=-1)
    run = Run(model_folder, saver, max_epochs=3)
    assert times(run.rows) == {3} and run.steps == 8
    assert run.epochs.lengths == [3, 2, 3]  # ceil(10/4), ceil(20/4) - 3, ceil(30/4) - 5
    assert run.epochs.ends == run.epochs.validations == [3, 5, 8]
    assert {p.name for p in tmp_path.iterdir()} == {
        *("epoch=0-step=3.ckpt", "epoch=1-step=5.ckpt", "epoch=2-step=8.ckpt")
    }


def test_fractions_are_of_a_pass_and_an_interval_beyond_it_is_of_the_run(
    model_folder: str,
) -> None:
    seen = Run(model_folder, max_epochs=-1, rollout={"num_epochs": 2}, val_check_interval=0.4)
    assert seen.epochs.validations == [1, 2, 3, 4, 5]  # int(0.4 * 3) is 1, and int(0.4 * 2) is 0
    of_run = Run(model_folder, max_steps=8, val_check_interval=4)
    assert of_run.epochs.validations == [4, 8] and of_run.epochs.ends == [3, 5, 8]


def test_a_limit_of_batches_makes_every_epoch_as_long(model_folder: str) -> None:
    run = Run(model_folder, max_epochs=3, limit_train_batches=2, check_val_every_n_epoch=2)
    assert run.epochs.lengths == [2, 2, 2]
    assert run.epochs.validations == [4, 6]  # after every second epoch, and of the last version


def test_early_stopping_counts_epochs(model_folder: str) -> None:
    stop = EarlyStopping("train/reward", mode="max", min_delta=9.0, patience=2)
    run = Run(model_folder, stop, max_epochs=9)
    assert run.epochs.ends == [3, 5, 8]


def test_a_run_within_its_first_epoch_is_that_epoch(model_folder: str) -> None:
    run = Run(model_folder, max_steps=2, val_check_interval=0.5, rollout={"batch_size": 1})
    assert run.epochs.lengths == [2] and run.epochs.validations == [1, 2]


@pytest.mark.parametrize(
    ("flags", "rollout", "num_batches"),
    [
        ({"max_epochs": 3}, {}, 8),  # ceil(30 / 4)
        ({"max_epochs": 3, "max_steps": 6}, {}, 3),  # the earlier end of two
        ({"max_epochs": -1}, {"num_epochs": 1, "last_batch": "drop"}, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.7}, {}, 4),
    ],
)
def test_a_decay_ends_with_the_run_and_steps_have_an_axis(
    model_folder: str, flags: dict[str, Any], rollout: dict[str, Any], num_batches: int
) -> None:
    decay = {"optimizer": sdp.OptimizerConfig(lr=1.0e-3, schedule="linear")}
    update = sdp.UpdateConfig(num_minibatches=2)
    run = Run(model_folder, module=decay | {"update": update}, rollout=rollout, **flags)
    ends = [2 * number for number in range(1, num_batches + 1)]
    assert [metrics["train/optimizer_step"] for metrics in run.recorder.metrics] == ends
    rates = [1e-3 * (1 - (end - 1.5) / ends[-1]) for end in ends]  # the mean of two steps
    assert [metrics["train/lr"] for metrics in run.recorder.metrics] == pytest.approx(rates)


def test_a_decay_without_an_end_is_refused(model_folder: str) -> None:
    decay = {"optimizer": sdp.OptimizerConfig(schedule="cosine")}
    with pytest.raises(sdp.ConfigError, match=r"'cosine' needs total_steps.*nor a known number"):
        Run(model_folder, module=decay, max_epochs=-1, max_time="00:01:00:00")


@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.slow), 4, 5])
def test_a_stop_within_an_epoch_or_at_its_end_loses_no_row(
    model_folder: str, tmp_path: Path, stop: int
) -> None:
    first = Run(model_folder, ModelCheckpoint(tmp_path), stop=stop, max_epochs=3)
    assert first.steps == stop
    (path,) = tmp_path.glob("*stopped*")
    second = Run(model_folder, ckpt_path=path, max_epochs=3)
    assert times(first.rows + second.rows) == {3} and second.steps == 8
    assert first.epochs.ends + second.epochs.ends == [3, 5, 8]


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [-1, 8])
def test_a_checkpoint_of_any_kind_leads_to_the_same_end(
    model_folder: str, tmp_path: Path, max_steps: int
) -> None:
    kinds: list[dict[str, Any]] = [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1},
        {"monitor": "val/reward"},
    ]
    savers = [
        ModelCheckpoint(tmp_path / str(kind), "{step}", save_top_k=-1, **settings)
        for kind, settings in enumerate(kinds)
    ]
    ends: dict[str, Any] = {"max_steps": max_steps, "max_epochs": 3}
    whole = Run(model_folder, *savers, **ends)
    assert times(whole.rows) == {3}
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert len(paths) == 8 + 3 + 3
    for path in paths:
        done = int(path.stem.removeprefix("step="))
        again = Run(model_folder, ckpt_path=path, **ends)
        assert again.steps == 8, path
        assert times(whole.rows[: done * 4] + again.rows) == {3}


def test_the_1000_epochs_of_a_trainer_without_an_end_are_said_in_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for settings, said in (({}, True), ({"max_steps": 4}, False), ({"max_epochs": 999}, False)):
        trainer = make_trainer(**({"max_epochs": 1000} | settings))
        trainer.state.fn = "fit"  # type: ignore[assignment]
        caplog.clear()
        PromptEpochs(make_rows(10), 4).plan(trainer, sdp.RolloutConfig(batch_size=4))
        assert ("this run has 2500 steps of a batch. Set max_steps" in caplog.text) is said
