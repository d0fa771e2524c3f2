"""The line of a run: on a terminal, in a notebook, in a log."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Timer

import sdp_lightning as sdp
from sdp_lightning.observability.progress import callback, screens
from sdp_lightning.observability.progress.callback import ProgressLine
from sdp_lightning.observability.progress.pace import LATELY, Pace, seconds_left
from sdp_lightning.observability.progress.screens import LogScreen, NotebookScreen, TerminalScreen
from sdp_lightning.testing import FakeEngine
from support.metric_runs import ROWS, Replay, replay
from support.paths import TESTS
from support.trainers import make_data, make_module, make_trainer


@pytest.fixture(autouse=True)
def not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")


# Lines ----------------------------------------------------------------------------------------


def test_off_a_terminal_every_step_is_a_line_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(tmp_path, ProgressLine())
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split("  ")[1] for line in lines[:2]] == ["reward 0.250", "reward 0.750"]
    assert lines[3:] == ["evaluating", "evaluated  reward 0.625"]
    assert "\r" not in out and "\x1b" not in out


def test_on_a_terminal_the_line_is_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    replay(tmp_path, ProgressLine())
    out = capsys.readouterr().out
    assert out.count("\r\x1b[2K") == len(ROWS) + 2
    assert out.count("\n") == 2  # after the last step, and after the evaluation


@pytest.mark.parametrize("variable", [("CI", "true"), ("TERM", "dumb")], ids=lambda v: v[0])
def test_a_terminal_that_nobody_watches_gets_lines(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(screens.find_screen(), TerminalScreen)
    monkeypatch.setenv(*variable)
    assert isinstance(screens.find_screen(), LogScreen)


def test_a_line_is_never_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    screen = TerminalScreen()
    screen.show(["step 1/9", "reward 0.500", "a part that does not fit any more", "x"])
    assert capsys.readouterr().out == "\r\x1b[2Kstep 1/9  reward 0.500"


def test_a_disabled_line_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine()
    line.disable()
    replay(tmp_path, line)
    assert capsys.readouterr().out == ""
    line.enable()
    replay(tmp_path, line)
    assert "step" in capsys.readouterr().out


def test_what_the_module_prints_gets_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Talking(Replay):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.print("hello")

    trainer = L.Trainer(
        max_epochs=1,
        limit_val_batches=0,
        accelerator="cpu",
        callbacks=[ProgressLine()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Talking([]), [0], [0])
    assert "hello\n" in capsys.readouterr().out


def test_a_step_says_version_lag_groups_and_the_speed_of_both_sides() -> None:
    row = {
        "rollout/version": 7.0,
        "train/reward": 0.5,
        "lag/mean": 1.25,
        "rollout/pending": 4.0,
        "rollout/running": 3.0,
        "rollout/dropped_stale": 1.0,
        "rollout/dropped_overdue": 2.0,
        "time/step_s": 2.25,
        "speed/generated_tokens_per_s": 1234.0,
        "speed/train_tokens_per_s": 980.0,
    }
    assert "  ".join(callback.progress_parts(row, 14, 120, 75)) == (
        "step  14/120  v7  reward 0.500  lag 1.2  1:15  4 ready, 3 running, 3 dropped  2.2 s  "
        "tok/s 1.2k sampled, 980 trained"
    )


def test_the_time_left_is_told_by_the_latest_batches_and_not_by_the_first() -> None:
    pace = Pace()
    assert pace.seconds_for(4, 0.0) is None
    pace.note(100.0, 10)  # resumed at step 10
    pace.note(160.0, 12)  # 60 s, of which most was start-up
    assert pace.seconds_for(4, 160.0) == 120.0
    pace.note(164.0, 14)
    assert pace.seconds_for(4, 164.0) == 8.0  # 2 batches of 4 s
    assert pace.seconds_for(4, 167.0) == 5.0
    assert pace.seconds_for(4, 1000.0) == 4.0  # however long this batch takes, one is left
    for index in range(1, 2 * LATELY):
        pace.note(164.0 + index, 14 + 2 * index)
    assert pace.seconds_for(4, 164.0 + 2 * LATELY - 1) == 2.0


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "num_epochs", "batches", "timer_s", "left"),
    [
        (24, None, None, 10**9, None, 30.0),  # 20 steps of 1.5 s
        (-1, 3, None, 4, None, 30.0),  # 12 batches, of which 2 are done
        (-1, 1000, 2, 4, None, 18.0),
        (24, 3, None, 4, 7.5, 7.5),
        (-1, -1, 3, 10**9, None, None),
        (-1, 3, None, float("inf"), None, None),
        (3, None, None, 10**9, None, 0.0),
    ],
)
def test_the_nearest_end_counts(
    max_steps: int,
    max_epochs: int | None,
    num_epochs: int | None,
    batches: float,
    timer_s: float | None,
    left: float | None,
) -> None:
    pace = Pace()
    for index in range(3):
        pace.note(3.0 * index, 2 * index)
    timer = Timer(timedelta(seconds=timer_s)) if timer_s else None
    trainer: Any = SimpleNamespace(
        max_steps=max_steps,
        max_epochs=max_epochs,
        global_step=4,
        num_training_batches=batches,
        callbacks=[timer] if timer else [],
        datamodule=make_data(engine=FakeEngine(), num_epochs=num_epochs),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=1)),
    )
    assert seconds_left(trainer, pace, 6.0) == left


# Waiting --------------------------------------------------------------------------------------


class Watched:
    """A live screen that keeps what is shown, and lets the engine sample once a wait is."""

    is_live = True

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shown, self.ended = engine, list[str](), 0

    def show(self, parts: list[str]) -> None:
        self.shown.append("  ".join(parts))
        if "waiting for rollouts" in self.shown[-1]:
            self.engine.advance(6, awaiting=None)  # comes again with the next tick

    def end(self) -> None:
        self.ended += 1


def test_while_a_batch_is_waited_for_the_line_says_so(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled before the line has said that it waits: else this test never ends."""
    engine = FakeEngine(manual=True)
    screen = Watched(engine)
    monkeypatch.setattr(callback, "find_screen", lambda: screen)
    monkeypatch.setattr(callback, "TICK_S", 0.01)
    monkeypatch.setattr(callback, "PATIENCE_S", 0.0)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), ProgressLine(), max_steps=2, enable_progress_bar=True
    )
    trainer.fit(make_module(model_folder), make_data(engine=engine))
    waits = [text for text in screen.shown if "waiting" in text]
    assert re.search(r"^step 0/2  0:\d\d  waiting for rollouts \d+ s: \d of 2 ready, ", waits[0])
    assert any(text.startswith("step 2/2  v2  reward") for text in screen.shown)
    assert any(re.search(r"^step 1/2 .*  0:\d\d, ETA in \d:\d\d  ", text) for text in screen.shown)
    assert screen.ended


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ("score", "scoring segments 0 s"),
        ("train", "training 0 s"),
        ("publish", "publishing weights 0 s"),
        ("evaluate", "evaluating 0 s"),
        ("rest", None),
        ("wait", None),  # of what, when there is no executor any more?
    ],
)
def test_what_takes_long_is_said(
    phase: str, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(engine=FakeEngine())
    trainer: Any = SimpleNamespace(datamodule=data)
    data.phase_timer.enter(phase)
    assert callback.activity_text(trainer) is None  # not yet
    monkeypatch.setattr(callback, "PATIENCE_S", 0.0)
    assert callback.activity_text(trainer) == text
    assert callback.activity_text(SimpleNamespace(datamodule=None)) is None  # type: ignore


# Notebooks ------------------------------------------------------------------------------------


def test_in_a_notebook_one_output_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            made[-1].append(data["text/plain"])

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        made.append([data["text/plain"]])
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    screen = NotebookScreen()
    screen.show(["step 1", "reward 0.5"])
    screen.show(["step 2"])
    screen.end()
    screen.show(["evaluating"])
    assert made == [["step 1  reward 0.5", "step 2"], ["evaluating"]]


def test_a_notebook_is_known_by_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    class ZMQInteractiveShell:
        pass

    class Shell(ZMQInteractiveShell):
        """Of Colab."""

    for shell in (ZMQInteractiveShell(), Shell()):
        found = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(screens.sys.modules, "IPython", found)  # type: ignore
        assert isinstance(screens.find_screen(), NotebookScreen)
    nothing = SimpleNamespace(get_ipython=lambda: None)
    monkeypatch.setitem(screens.sys.modules, "IPython", nothing)  # type: ignore
    assert isinstance(screens.find_screen(), LogScreen)


CELL = """
import sys, logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
sys.path.insert(0, {tests!r})
import sdp_lightning as sdp
from support.trainers import make_data, make_module, make_trainer
from sdp_lightning.testing import FakeEngine
data = make_data(engine=FakeEngine(latency_s=1.5))
trainer = make_trainer(
    sdp.WeightSyncCallback(), sdp.ProgressLine(), max_steps=3, enable_progress_bar=True
)
trainer.fit(make_module({model!r}), data)
"""


@pytest.mark.slow
def test_a_real_notebook_keeps_the_last_line_alone(model_folder: str) -> None:
    import nbformat
    from nbclient import NotebookClient

    tests = str(TESTS)
    cell = nbformat.v4.new_code_cell(CELL.format(tests=tests, model=model_folder))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [out for out in cell.outputs if out.output_type == "display_data"]
    assert len(shown) == 1, cell.outputs
    assert shown[0]["data"]["text/plain"].startswith("step 3/3  v3  reward")
    assert not [out for out in cell.outputs if out.get("name") == "stdout"]
