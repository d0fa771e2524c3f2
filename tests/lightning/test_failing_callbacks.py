"""A user's callback that raises once training has begun is named, counted and set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.failing_observers import DiskFull, set_aside
from support.trainers import make_data, make_module, make_rows, make_trainer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

STEP_HOOKS = (
    *("on_train_batch_start", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
LATER_HOOKS = (
    *("on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end"),
    *("state_dict", "on_save_checkpoint", "on_train_end", "on_fit_end", "teardown"),
)
HOOKS_BEFORE = ("setup", "on_fit_start", "on_sanity_check_start", "on_train_start")


class Failing(Callback):
    """Counts the calls of the hooks that a subclass makes fail."""

    def __init__(self) -> None:
        self.calls = 0

    def fail(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        raise DiskFull


def failing_in(*names: str) -> Failing:
    return type(f"Fails_in_{names[0]}", (Failing,), dict.fromkeys(names, Failing.fail))()


def fit(folder: str, *callbacks: Callback, failing: Any = "set_aside", **settings: Any) -> Any:
    sync = sdp.WeightSyncCallback(failing_callbacks=failing)
    trainer = make_trainer(*callbacks, sync, **({"max_steps": 2} | settings))
    data = make_data(engine=FakeEngine(), max_head_lag=1, val_prompts=make_rows(1))
    trainer.fit(make_module(folder), data)
    return trainer


@pytest.mark.fault("exception", "observer")
def test_whatever_hook_fails_the_callback_is_named_once_counted_and_the_run_is_whole(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [*STEP_HOOKS, *LATER_HOOKS]
    callbacks = [failing_in(name) for name in names]
    trainer = fit(
        model_folder,
        *callbacks,
        ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1),
        logger=CSVLogger(tmp_path, name="", version="log"),
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert trainer.global_step == 2
    for name, callback in zip(names, callbacks, strict=True):
        assert set_aside(caplog, f"{name} of Fails_in_{name}") == callback.calls == 1, name
    assert "No space left on device (from" in caplog.text and "in fail). Lost: " in caplog.text
    assert "failing_callbacks='raise'" in caplog.text
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 2
    assert trainer.callback_metrics["run/callbacks_set_aside"] == len(STEP_HOOKS) + 2
    assert "run/callbacks_set_aside" in (tmp_path / "log" / "metrics.csv").read_text()


def test_one_that_is_set_aside_gets_no_more_calls_but_to_end_and_those_of_the_next_run(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    often = failing_in("on_train_batch_end", "on_train_end", "state_dict", "load_state_dict")
    ended: list[str] = []
    often.teardown = lambda trainer, pl_module, stage: ended.append(stage)
    trainer = fit(model_folder, often)
    assert often.calls == 1 and often.state_dict() == {} and ended == ["fit"]
    assert set_aside(caplog, "on_train_batch_end of Fails_in_on_train_batch_end") == 1
    fit(model_folder, often)
    assert often.calls == 2, "another Trainer takes it, and asks it again"
    with pytest.raises(DiskFull):
        trainer.validate(trainer.lightning_module, make_data(val_prompts=make_rows(1)))
        often.load_state_dict({})


@pytest.mark.parametrize("name", HOOKS_BEFORE)
def test_before_the_first_batch_it_ends_the_run_and_is_named(model_folder: str, name: str) -> None:
    with pytest.raises(DiskFull) as info:
        fit(model_folder, failing_in(name))
    notes = getattr(info.value, "__notes__", [])
    assert notes == [f"It was raised in {name} of Fails_in_{name}, a callback."] or name == "setup"


def leave(*args: Any) -> None:
    raise SystemExit(7)


def divide(*args: Any) -> None:
    raise ZeroDivisionError


class KeepsBest(ModelCheckpoint):
    """A user's way of saving, without which the run would go on unsaved."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise DiskFull


@pytest.mark.parametrize(
    ("callback", "failing", "error"),
    [
        (failing_in("on_train_batch_end"), "raise", DiskFull),
        (KeepsBest(), "set_aside", DiskFull),
        (EarlyStopping("no/such/metric"), "set_aside", RuntimeError),
        (LambdaCallback(on_train_batch_end=leave), "set_aside", SystemExit),
        (LambdaCallback(on_train_batch_end=divide), "raise", ZeroDivisionError),
    ],
    ids=["as Lightning", "a way of saving", "a way of stopping", "exit", "lambda as Lightning"],
)
def test_what_must_end_a_run_does(
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    callback: Callback,
    failing: str,
    error: type[BaseException],
) -> None:
    monkeypatch.chdir(tmp_path)
    saves = isinstance(callback, ModelCheckpoint)
    with pytest.raises(error):
        fit(model_folder, callback, failing=failing, enable_checkpointing=saves)


def test_functions_given_to_a_callback_of_lightning_are_users_and_may_stop_the_run(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = True

    fails = LambdaCallback(on_after_backward=divide)
    trainer = fit(model_folder, fails, LambdaCallback(on_train_batch_end=stop), max_steps=4)
    assert trainer.global_step == 1
    assert set_aside(caplog, "on_after_backward of LambdaCallback") == 1


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(sdp.ConfigError, match=r"failing_callbacks='ignore' is none of \('set_asi"):
        sdp.WeightSyncCallback(failing_callbacks="ignore")  # type: ignore[arg-type]
