"""Every flag of the Trainer and every callback of Lightning works here, or says that it cannot."""

from __future__ import annotations

import inspect
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import callbacks as lc
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.lightning.trainer_flags import refuse_callbacks
from sdp_lightning.testing import FakeEngine
from support.trainer_flags_page import CALLBACKS, FLAGS, Case, page
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

PAGE = Path(__file__).parents[2] / "docs/reference/trainer-flags.md"


def test_the_page_has_all_flags_and_callbacks_and_is_that_of_the_cases() -> None:
    assert list(FLAGS) == [*inspect.signature(L.Trainer.__init__).parameters][1:]
    assert list(CALLBACKS) == lc.__all__
    assert PAGE.read_text() == page()


@pytest.mark.parametrize(
    "name", [n for n, (case, _) in CALLBACKS.items() if case.status == "refused"]
)
def test_a_refused_callback_is_named_with_what_to_use(name: str) -> None:
    """Also one that a user derived from it."""
    _, make = CALLBACKS[name]
    assert make is not None
    callback = make()
    with pytest.raises(sdp.ConfigError, match=name):
        refuse_callbacks([Callback(), callback])
    callback.__class__ = type("Mine", (type(callback),), {})
    with pytest.raises(sdp.ConfigError, match=r"^Mine "):
        refuse_callbacks([callback])


def fit(folder: str, *callbacks: Callback, minibatches: int = 1, **settings: Any) -> L.Trainer:
    """Fit 8 rows, 2 a batch, without a WeightSyncCallback."""
    update = sdp.UpdateConfig(num_minibatches=minibatches)
    trainer = make_trainer(*callbacks, **settings)
    data = make_data(rows=make_rows(8), engine=FakeEngine(), val_prompts=make_rows(3))
    trainer.fit(make_module(folder, update=update), data)
    return trainer


def test_flags_are_translated(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """6 steps in batches of 2: the multiples 3 and 6 of 3 are at or before the ends 4 and 6."""
    caplog.set_level(logging.INFO)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    flags: dict[str, Any] = {"gradient_clip_val": 1e-9, "enable_checkpointing": True}
    trainer = fit(model_folder, saver, minibatches=2, max_steps=6, **flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=4.ckpt", "step=6.ckpt"]
    module = trainer.lightning_module
    assert isinstance(module, sdp.SegmentWisePPOModule)
    assert module.optimizer.gradient_clip_val == 1e-9
    assert "gradient_clip_val=1e-09 of the Trainer is in force, in place of 1.0" in caplog.text
    added = [r.getMessage() for r in caplog.records if "WeightSyncCallback" in r.getMessage()]
    assert len(added) == 1 and "is added" in added[0]
    assert isinstance(trainer.callbacks[0], sdp.WeightSyncCallback)  # type: ignore[attr-defined]
    state = trainer.callback_metrics
    assert state["rollout/version"] == 3


def test_a_trial_trains_whole_batches(model_folder: str) -> None:
    assert fit(model_folder, minibatches=2, fast_dev_run=2).global_step == 4


@pytest.mark.parametrize("batches", [2, 0.5], ids=["number", "share"])
def test_overfitting_trains_on_the_first_rows_again(model_folder: str, batches: float) -> None:
    recorder = Recorder()
    fit(model_folder, sdp.WeightSyncCallback(), recorder, overfit_batches=batches, max_epochs=2)
    assert {row for step in recorder.steps for row in step.row_ids} == {f"row{i}" for i in range(4)}
    assert len(recorder.steps) == 4


RUN = {name: case for name, case in FLAGS.items() if case.settings is not None}


@pytest.mark.parametrize(
    "name",
    [
        n if c.status == "refused" else pytest.param(n, marks=pytest.mark.slow)
        for n, c in RUN.items()
    ],
)
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_a_flag_does_what_the_page_says(model_folder: str, name: str) -> None:
    case = RUN[name]
    settings = dict(case.settings or {})
    if name == "barebones":  # it refuses the flags that it turns off
        data = make_data(rows=make_rows(8), engine=FakeEngine())
        trainer = L.Trainer(accelerator="cpu", devices=1, **settings)
        trainer.fit(make_module(model_folder), data)
        assert trainer.global_step == case.steps
    elif case.status == "refused":
        with pytest.raises(sdp.ConfigError, match=name) as refused:
            fit(model_folder, **settings)
        assert "Type." not in str(refused.value)  # a value as it was given, not Lightning's enum
    else:
        assert fit(model_folder, **settings).global_step == case.steps


RUN_CALLBACKS: dict[str, tuple[Case, Any]] = {
    name: (case, make)
    for name, (case, make) in CALLBACKS.items()
    if make is not None and case.status == "works"
}
LOGGED = {  # a name that a callback logs
    "DeviceStatsMonitor": "DeviceStatsMonitor.on_train_batch_end/cpu_percent",
    "LearningRateMonitor": "lr-AdamW",
    "ThroughputMonitor": "train/device/samples_per_sec",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:When using the .ThroughputMonitor.")
@pytest.mark.parametrize("name", RUN_CALLBACKS)
def test_a_callback_that_works_goes_through_a_fit(
    model_folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case, make = RUN_CALLBACKS[name]
    callback = make()
    shown: dict[str, Any] = {
        "enable_progress_bar": isinstance(callback, lc.ProgressBar),
        "enable_model_summary": isinstance(callback, lc.ModelSummary),
        "enable_checkpointing": isinstance(callback, lc.Checkpoint),
        "logger": CSVLogger(tmp_path, "", ""),
    }
    assert fit(model_folder, callback, max_steps=2, **shown).global_step == case.steps
    metrics = (tmp_path / "metrics.csv").read_text()
    assert LOGGED.get(name, "train/loss") in metrics
    if name == "ModelCheckpoint":
        assert [*tmp_path.rglob("*.ckpt")]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_checkpoints_by_time_are_saved_at_ends_of_batches(
    model_folder: str, tmp_path: Path
) -> None:
    """Lightning leaves them out of a module that steps its optimizer itself."""
    savers = [
        ModelCheckpoint(
            tmp_path / name, "{step}", train_time_interval=timedelta(**interval), save_top_k=-1
        )
        for name, interval in {"always": {"microseconds": 1}, "later": {"days": 1}}.items()
    ]
    fit(model_folder, *savers, minibatches=2, max_steps=4, enable_checkpointing=True)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt"))
    assert names == ["always/step=2.ckpt", "always/step=4.ckpt"]


class FailAt(Callback):
    """Raises at the end of the epoch that ends with step ``step``."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._step:
            raise RuntimeError("of the user")


def test_an_on_exception_checkpoint_is_gone_on_with_by_its_own_run_only(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a ``ckpt_path``: Lightning takes whatever lies in the folder."""
    settings: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2}

    def fit_some(*callbacks: Callback, minibatches: int = 1) -> L.Trainer:
        saver, publish = lc.OnExceptionCheckpoint(tmp_path), sdp.WeightSyncCallback
        own = (publish(failing_callbacks="raise"), saver, *callbacks)
        kept: dict[str, Any] = settings | {"enable_checkpointing": True}
        return fit(model_folder, *own, minibatches=minibatches, **kept)

    with pytest.raises(RuntimeError, match="of the user"):
        fit_some(FailAt(2))
    assert (tmp_path / "on_exception.ckpt").is_file()
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="of the user"):
        fit_some(recorder, FailAt(4), minibatches=2)
    assert len(recorder.steps) == 2 and "begins anew" in caplog.text
    recorder = Recorder()
    trainer = fit_some(recorder, minibatches=2)
    assert trainer.global_step == 8 and len(recorder.steps) == 2
    assert not [*tmp_path.iterdir()]  # a run that ends well needs none


def test_ranks_that_would_be_spawned_are_refused_with_the_strategy_to_use(
    model_folder: str,
) -> None:
    with pytest.raises(sdp.ConfigError, match=r"'ddp_spawn'.*'ddp', which"):
        fit(model_folder, strategy="ddp_spawn", devices=2, max_steps=2)
