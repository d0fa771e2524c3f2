"""An observer that raises is named once and set aside; the run and its error are untouched."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.lightning.observer import HOOKS, Observer
from sdp_lightning.testing import FakeEngine
from support.trainers import make_data, make_module, make_rows, make_trainer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class DiskFull(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


class At(Callback):
    """Calls a function at the start of the third batch."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self._function()


def fail() -> None:
    raise ValueError("the real error, about a completion \ud800")


def nothing() -> None:
    pass


def run(folder: str, *callbacks: Callback, logger: Any = False, rows: Any = None) -> L.Trainer:
    engine = FakeEngine()
    data = make_data(engine=engine, rows=rows, max_head_lag=1)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), *callbacks, logger=logger, max_steps=4, log_every_n_steps=1
    )
    try:
        trainer.fit(make_module(folder), data)
    finally:
        with pytest.raises(sdp.EngineError, match="closed"):
            engine.update_weights([], 99, reset=True)
    return trainer


def set_aside(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(f"{name} failed and is set aside: " in r.getMessage() for r in caplog.records)


def observer_of(name: str, tmp_path: Path) -> Callback:
    if name == "RunReport":
        return sdp.RunReport(save_every_s=0)
    return sdp.Recorder(tmp_path / "run" / "recording", rows_per_file=1)


@pytest.mark.parametrize("name", ["RunReport", "Recorder"])
@pytest.mark.parametrize("own", [nothing, fail], ids=["healthy", "failing"])
def test_a_folder_that_goes_away_neither_ends_nor_hides_a_run(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, own: Any
) -> None:
    folder = tmp_path / "run"

    def lose_the_folder() -> None:
        for path in (folder / "report", folder / "recording"):
            shutil.rmtree(path, ignore_errors=True)
            path.write_text("no folder any more")
        own()

    callbacks = [observer_of(name, tmp_path), At(lose_the_folder)]
    logger = CSVLogger(tmp_path, name="", version="run")
    if own is fail:
        with pytest.raises(ValueError, match="the real error"):
            run(model_folder, *callbacks, logger=logger)
    else:
        assert run(model_folder, *callbacks, logger=logger).global_step == 4
    assert set_aside(caplog, name) == (1 if own is nothing or name == "RunReport" else 0)


def test_a_row_id_and_an_error_that_are_no_unicode_reach_page_and_recording(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"id": f"{row['id']}\ud800"} for row in make_rows()]
    report, recorder = sdp.RunReport(save_every_s=0), sdp.Recorder(tmp_path / "recording")
    with pytest.raises(ValueError, match="the real error"):
        logger = CSVLogger(tmp_path, name="", version="run")
        run(model_folder, report, recorder, At(fail), rows=rows, logger=logger)
    assert report.path is not None
    assert r"about a completion \ud800" in report.path.read_text(encoding="utf-8")
    batch = sdp.Recording(recorder.written_to).read(0)
    assert all(group.row_id.endswith(r"\ud800") for group in batch.groups)
    assert not any("set aside" in record.getMessage() for record in caplog.records)


class FullLogger(CSVLogger):
    """Its disk is full from the second save on."""

    saves = 0

    def save(self) -> None:
        self.saves += 1
        if self.saves > 1:
            raise DiskFull


@pytest.mark.parametrize("own", [nothing, fail], ids=["healthy", "failing"])
def test_a_logger_on_a_full_disk_is_named_once_and_set_aside(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    logger = FullLogger(tmp_path, flush_logs_every_n_steps=1)
    if own is fail:
        with pytest.raises(ValueError, match="the real error"):
            run(model_folder, At(own), logger=logger)
    else:
        assert run(model_folder, At(own), logger=logger).global_step == 4
    assert set_aside(caplog, "FullLogger") == 1 and logger.saves == 2
    logger.saves = -100
    run(model_folder, logger=logger)
    assert logger.saves > -99, "the next run asks it again"
    assert set_aside(caplog, "FullLogger") == 1


class Avenger(Callback):
    def on_exception(self, *args: Any) -> None:
        raise LookupError("an error about an error")


def test_a_callback_that_raises_in_on_exception_neither_hides_nor_keeps_open(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="the real error") as info:
        run(model_folder, Avenger(), At(fail))
    assert info.value.__context__ is None
    assert set_aside(caplog, "on_exception of Avenger") == 1


class Interrupted(Callback):
    def on_exception(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_a_signal_that_ends_the_ending_leaves_nothing_open(model_folder: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, Interrupted(), At(fail))


class Fragile(Observer):
    """Fails in every hook, in none before the first step."""

    lost = "nothing"
    calls = released = 0

    def let_go(self) -> None:
        self.released += 1

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls += 1
        raise DiskFull

    def on_train_end(self, *args: Any) -> None:
        self.calls += 1
        raise DiskFull


def test_a_new_observer_is_guarded_without_a_try_of_its_own(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    fragile = Fragile()
    assert run(model_folder, fragile).global_step == 4
    assert (fragile.calls, fragile.released) == (1, 1)
    assert set_aside(caplog, "Fragile") == 1
    (said,) = [r for r in caplog.records if "Fragile" in r.getMessage()]
    assert said.levelno == logging.WARNING and "No space left on device" in said.getMessage()
    run(model_folder, fragile)
    assert fragile.calls == 2, "the next run asks it again"


class Refusing(Observer):
    lost = "nothing"

    def let_go(self) -> None: ...

    def on_train_start(self, *args: Any) -> None:
        raise sdp.ConfigError("not with these settings")

    def on_train_batch_end(self, *args: Any) -> None:
        raise sdp.HangError("no sign of life")


def test_refusals_before_the_first_step_and_the_watchdog_s_error_pass_through() -> None:
    observer = Refusing()
    with pytest.raises(sdp.ConfigError, match="not with these settings"):
        observer.on_train_start()
    with pytest.raises(sdp.HangError, match="no sign of life"):
        observer.on_train_batch_end()
    assert not observer.is_set_aside


@pytest.mark.parametrize(
    "kind", [sdp.RunReport, sdp.Recorder, sdp.ProgressLine, sdp.RunSummary, sdp.Watchdog]
)
def test_each_of_our_observers_is_one(kind: type[Callback]) -> None:
    assert issubclass(kind, Observer) and kind.lost
    own = [vars(kind)[name] for name in HOOKS & vars(kind).keys()]
    assert own and all(vars(method)["__wrapped__"] for method in own)
