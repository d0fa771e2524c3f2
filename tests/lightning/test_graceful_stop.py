"""A fit that is told to stop ends between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.stopped_runs import (
    CODES,
    STOPPED,
    WAIT_S,
    CallAt,
    Run,
    fail,
    saved_in,
    send,
)
from support.trainers import make_rows

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("hook", ["step", "end", "validation"])
def test_a_signal_ends_the_fit_after_the_step_with_a_checkpoint_that_goes_on(
    model_folder: str, tmp_path: Path, signum: int, hook: str
) -> None:
    """In the step of version 3 the step is finished; after it, version 3 is what there is."""
    settings: dict[str, Any] = {"val_check_interval": STOPPED, "check_val_every_n_epoch": None}
    validated = {"data": {"val_prompts": make_rows(2)}} | settings
    first = Run(model_folder, tmp_path, CallAt(hook, send(signum)), **validated)
    with pytest.raises(SystemExit) as ended:
        first.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    version = STOPPED + (hook == "step")
    assert first.sync.version == version == first.trainer.global_step
    assert saved_in(tmp_path) == [f"last-stopped-step={version}.ckpt"]
    second = Run(model_folder, tmp_path, **validated)
    with pytest.warns(UserWarning, match="is not empty"):
        second.fit(ckpt_path="last")
    assert [step.batch.version for step in second.recorder.steps] == list(range(version, 8))
    for name, value in first.recorder.weights[version].items():
        assert value.equal(second.recorder.weights[version][name])
    trained = first.rows[: 2 * version] + second.rows
    assert len(trained) == len(set(trained)) == 16


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
def test_a_signal_ends_a_wait_for_rollouts_with_a_checkpoint(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    """The engine stops answering; the wait's own deadline is far away."""

    class Stalls(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            if self.version == 2:
                if not told.is_set():
                    told.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signum)
                self.manual = True
            return await super().generate(request, sink)

    told = threading.Event()
    run = Run(model_folder, tmp_path, engine=Stalls(), data={"timeout_s": 1e6})
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    assert saved_in(tmp_path) == [f"last-stopped-step={run.sync.version}.ckpt"]


@pytest.mark.parametrize(
    "settings",
    [{"enable_checkpointing": False}, {"fast_dev_run": 5}],
    ids=["without checkpointing", "fast_dev_run"],
)
def test_nothing_is_saved_where_the_trainer_does_not_checkpoint(
    model_folder: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = Run(model_folder, tmp_path, CallAt("step", send(signal.SIGINT)), **settings)
    with pytest.raises(SystemExit):
        run.fit()
    assert run.sync.version == STOPPED + 1
    assert list(tmp_path.iterdir()) == []


def test_opted_out_ctrl_c_ends_the_step_at_once_and_saves_nothing(
    model_folder: str, tmp_path: Path
) -> None:
    call = CallAt("step", send(signal.SIGINT))
    run = Run(model_folder, tmp_path, call, sync={"save_on_stop": False})
    with pytest.raises(SystemExit):
        run.fit()
    assert run.sync.version == STOPPED
    assert saved_in(tmp_path) == []


def test_nothing_trained_is_nothing_saved(model_folder: str, tmp_path: Path) -> None:
    call = CallAt("end", send(signal.SIGINT), step=1)
    first = Run(model_folder, tmp_path, call)
    with pytest.raises(SystemExit):
        first.fit()
    assert saved_in(tmp_path) == ["last-stopped-step=1.ckpt"]
    (tmp_path / "last-stopped-step=1.ckpt").rename(tmp_path / "kept.ckpt")

    class AtStart(Callback):
        def on_train_start(self, *_: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    second = Run(model_folder, tmp_path, AtStart())
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="is not empty"):
        second.fit(ckpt_path=tmp_path / "kept.ckpt")
    assert saved_in(tmp_path) == ["kept.ckpt"]


@pytest.mark.parametrize("second", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("first", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("hook", ["step", "end"])
def test_a_second_signal_ends_at_once_and_saves_nothing(
    model_folder: str, tmp_path: Path, first: int, second: int, hook: str
) -> None:
    run = Run(model_folder, tmp_path, CallAt(hook, send(first, second)))
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(second)]
    assert run.sync.version == STOPPED
    assert saved_in(tmp_path) == []


@pytest.mark.fault("hang", "train step")
def test_a_step_that_outlasts_the_grace_is_abandoned(model_folder: str, tmp_path: Path) -> None:
    def hang() -> None:
        signal.raise_signal(signal.SIGTERM)
        assert not threading.Event().wait(WAIT_S)
        raise AssertionError("the step was not ended")

    run = Run(model_folder, tmp_path, CallAt("step", hang), sync={"stop_grace_s": 0.2})
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == 128 + signal.SIGTERM
    assert saved_in(tmp_path) == []


class SignalWhileSaving(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.fault("exception", "checkpoint")
def test_a_signal_while_the_checkpoint_is_written_leaves_no_part_of_it(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    call = CallAt("end", send(signum))
    run = Run(model_folder, tmp_path, call, plugins=[SignalWhileSaving()])
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    assert list(tmp_path.rglob("*stopped*")) == []
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = run.data.executor


class FullDisk(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")


@pytest.mark.fault("exception", "checkpoint")
def test_a_checkpoint_that_cannot_be_written_is_told_and_all_is_closed(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(model_folder, tmp_path, CallAt("end", send(signal.SIGTERM)), plugins=[FullDisk()])
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.SIGTERM]
    assert "version 3 could not be saved" in caplog.text and "no space left" in caplog.text
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = run.data.executor


@pytest.mark.parametrize(("hook", "saved"), [("end", ["last-stopped-step=3.ckpt"]), ("step", [])])
@pytest.mark.fault("exception", "train step")
def test_an_error_is_saved_from_between_steps_only(
    model_folder: str, tmp_path: Path, hook: str, saved: list[str]
) -> None:
    run = Run(model_folder, tmp_path, CallAt(hook, fail), sync={"failing_callbacks": "raise"})
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert saved_in(tmp_path) == saved


def test_lightnings_own_saving_on_exceptions_is_left_alone(
    model_folder: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True, every_n_epochs=1)
    call = CallAt("end", send(signal.SIGINT))
    run = Run(model_folder, tmp_path, call, saver)
    with pytest.raises(SystemExit):
        run.fit()
    assert saved_in(tmp_path) == ["step=3.ckpt"]


def test_a_signal_in_the_last_step_is_not_taken_for_an_end_by_itself(
    model_folder: str, tmp_path: Path
) -> None:
    run = Run(model_folder, tmp_path, CallAt("end", send(signal.SIGINT), step=8))
    with pytest.raises(SystemExit):
        run.fit()
    assert saved_in(tmp_path) == ["last-stopped-step=8.ckpt"]
