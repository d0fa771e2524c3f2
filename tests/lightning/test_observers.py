"""An observer that raises is named once and set aside; the run and its error are untouched."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.lightning.observer import HOOKS, Observer
from sdp_lightning.observability.progress import callback as progress
from sdp_lightning.observability.progress.screens import LogScreen
from sdp_lightning.observability.report import callback as report
from sdp_lightning.observability.report.files import RunWriter
from sdp_lightning.testing import FakeEngine
from support.failing_observers import At, Avenger, DiskFull, fail, nothing, run, set_aside
from support.trainers import make_data, make_module, make_rows, make_trainer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


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
    assert set_aside(caplog, name) == 1


@pytest.mark.fault("corrupted data", "observer")
def test_row_ids_and_an_error_that_no_file_expects_reach_every_output(
    model_folder: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = ["surrogate \ud800", "NUL \0, escape \x1b[31m, line\nfeed, \u202e", "long " + "x" * 10**6]
    rows = [row | {"id": f"{ids[number % 3]} {number}"} for number, row in enumerate(make_rows())]
    page, recorder = sdp.RunReport(save_every_s=0), sdp.Recorder(tmp_path / "recording")
    logger = CSVLogger(tmp_path, name="", version="run")
    observers = [page, recorder, sdp.ProgressLine(), sdp.RunSummary()]
    with pytest.raises(ValueError, match="the real error"):
        run(model_folder, *observers, At(fail), rows=rows, logger=logger)
    assert not any("set aside" in record.getMessage() for record in caplog.records)
    assert "step 2/4" in capsys.readouterr().out
    assert page.path is not None
    text = page.path.read_text(encoding="utf-8")
    assert r"about a completion \ud800" in text
    assert not {"\0", "\x1b", "\u202e"} & set(text) and len(text) < 10**6
    seen = {group.row_id for batch in sdp.Recording(recorder.written_to) for group in batch.groups}
    kinds = {row_id.rpartition(" ")[0] for row_id in seen}
    assert kinds == {ids[0].replace("\ud800", r"\ud800"), *ids[1:]}, "none is cut or changed"
    for group in (g for batch in sdp.Recording(recorder.written_to) for g in batch.groups):
        shown = sdp.view(group).html()
        assert not {"\0", "\x1b", "\u202e"} & set(shown) and len(shown) < 10**6


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


class Clinging(Fragile):
    """Fails also while it gives up what it holds, and has no state to save."""

    def let_go(self) -> None:
        super().let_go()
        raise DiskFull

    def state_dict(self) -> dict[str, Any]:
        raise DiskFull


def test_an_observer_that_cannot_let_go_or_be_saved_ends_no_run(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clinging = Clinging()
    trainer = run(model_folder, clinging)
    assert trainer.global_step == 4 and clinging.released == 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert "Clinging.let_go() failed" in caplog.text
    assert Clinging().state_dict() == {}


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


class DyingScreen(LogScreen):
    """Fails in the thread that rewrites the line, and only then lets the engine sample."""

    is_live = True

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def show(self, parts: list[str]) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._engine.manual = False
            self._engine.advance(6, awaiting=12)
            raise DiskFull


@pytest.mark.fault("thread died", "observer")
def test_a_thread_of_an_observer_that_dies_is_said_and_the_run_goes_on(
    model_folder: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(manual=True)
    monkeypatch.setattr(progress, "find_screen", lambda: DyingScreen(engine))
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), sdp.ProgressLine(), max_steps=2, enable_progress_bar=True
    )
    trainer.fit(make_module(model_folder), make_data(engine=engine))
    assert trainer.global_step == 2 and set_aside(caplog, "ProgressLine") == 1


@pytest.mark.fault("slow", "observer")
def test_samples_are_saved_less_often_where_the_disk_is_slow(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save takes 0.5 s by this clock, so the next one is due after 50 s: at the end."""
    clock, saved = [0.0], list[str]()
    state = RunWriter.state

    def slow(self: RunWriter, values: Any) -> None:
        clock[0] += 0.5
        saved.append(values["status"])
        state(self, values)

    monkeypatch.setattr(RunWriter, "state", slow)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = run(model_folder, sdp.RunReport(save_every_s=0), logger=CSVLogger(tmp_path))
    assert trainer.global_step == 4 and saved == ["running", "finished"]
