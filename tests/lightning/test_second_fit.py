"""Another fit in the same process goes on where the first one ended, or begins again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from support.stopped_runs import (
    CallAt,
    Run,
    fail,
    send,
)
from support.trainers import Recorder, make_module, make_rows, make_trainer

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def fit_again(run: Run, *, max_steps: int = 3, **settings: Any) -> Recorder:
    recorder = Recorder()
    sync = settings.pop("sync", run.sync)
    trainer = make_trainer(sync, recorder, max_steps=max_steps)
    module = settings.pop("module", run.module)
    trainer.fit(module, run.data)
    return recorder


def rows_of(recorder: Recorder) -> list[str]:
    return [row for step in recorder.steps for row in step.row_ids]


def have_begun_again(rows: list[str], first: Run) -> bool:
    """Three batches of 2 at a lag of at most 1 are 6 of the first 8 rows: both times, 4 or more."""
    return len(set(rows) & set(first.rows)) >= 4


@pytest.fixture
def fitted(model_folder: str, tmp_path: Path) -> Run:
    run = Run(
        model_folder,
        tmp_path,
        engine="embedded",
        max_steps=3,
        enable_checkpointing=False,
        data={"val_prompts": make_rows(1)},
        sync={"failing_callbacks": "raise"},
    )
    run.fit()
    return run


def test_a_second_fit_of_the_same_objects_goes_on_where_the_prompts_were(fitted: Run) -> None:
    make_trainer(fitted.sync).validate(fitted.module, fitted.data, verbose=False)
    second = fit_again(fitted)
    third = fit_again(fitted, max_steps=2)
    assert [s.batch.version for s in second.steps + third.steps] == [3, 4, 5, 6, 7]
    trained = fitted.rows + rows_of(second) + rows_of(third)
    assert len(trained) == len(set(trained)) == 16
    assert all(lag <= 1 for lags in second.lags for lag in lags)


def test_a_second_fit_of_the_same_trainer_goes_on_too(fitted: Run) -> None:
    fitted.trainer.fit_loop.epoch_loop.max_steps = 6
    fitted.fit()
    assert fitted.sync.version == fitted.trainer.global_step == 6
    assert len(fitted.rows) == len(set(fitted.rows)) == 12


@pytest.mark.parametrize("fresh", ["sync", "module"])
def test_with_another_policy_or_clock_the_prompts_begin_again(
    fitted: Run, model_folder: str, fresh: str
) -> None:
    """Rollouts of another policy, or of versions that are counted anew, are of no use."""
    made = {"sync": sdp.WeightSyncCallback(), "module": make_module(model_folder)}
    second = fit_again(fitted, **{fresh: made[fresh]})
    assert have_begun_again(rows_of(second), fitted)


def test_after_an_abandoned_step_the_prompts_begin_again(fitted: Run) -> None:
    """Its weights may have moved under the version of the rollouts that wait."""
    trainer = make_trainer(fitted.sync, CallAt("step", fail, step=1), max_steps=3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(fitted.module, fitted.data)
    assert have_begun_again(rows_of(fit_again(fitted)), fitted)


def test_after_ctrl_c_a_fit_goes_on_in_the_same_notebook(fitted: Run) -> None:
    seen = Recorder()
    stop = CallAt("end", send(signal.SIGINT), step=2)
    with pytest.raises(SystemExit):
        make_trainer(fitted.sync, seen, stop, max_steps=9).fit(fitted.module, fitted.data)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    third = fit_again(fitted)
    assert [s.batch.version for s in third.steps] == [5, 6, 7]
    trained = fitted.rows + rows_of(seen) + rows_of(third)
    assert len(trained) == len(set(trained)) == 16


def test_prompts_that_had_ended_begin_again(model_folder: str, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "max_epochs": 1, "data": {"num_epochs": 1}}
    run = Run(model_folder, tmp_path, engine="embedded", enable_checkpointing=False, **settings)
    run.fit()
    assert run.sync.version == 20
    assert len(rows_of(fit_again(run))) == 6
    assert run.sync.version == 23


def test_an_engine_object_serves_one_run_and_says_so(model_folder: str, tmp_path: Path) -> None:
    run = Run(model_folder, tmp_path, max_steps=1)
    run.fit()
    with pytest.raises(sdp.ConfigError, match=r"was closed at the end of the last run.*by name"):
        fit_again(run)
