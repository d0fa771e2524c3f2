"""Faults that no other test makes happen in their phase (see docs/faults.md)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import sdp_lightning as sdp
from sdp_lightning.errors import EngineError, RolloutError, RolloutTimeout
from sdp_lightning.rollout.task_runner import AsyncTaskRunner
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Row, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession
from support.interrupted_groups import SETTINGS, halfway, resume, run_to_the_end
from support.rollouts import DEADLINE_S, Samples, make_executor, rolling
from support.trainers import AwaitIdleRollouts, make_data, make_module, make_rows, make_trainer

LIMIT_S = 3.0  # far above what a busy machine may stand still


class Rows(list[dict[str, Any]]):
    """Calls ``act(index)`` whenever a row is read."""

    def __init__(self, act: Any, count: int = 16) -> None:
        super().__init__(make_rows(count))
        self._act = act

    def __getitem__(self, index: Any) -> Any:
        self._act(index)
        return super().__getitem__(index)


# Fetch --------------------------------------------------------------------------------------------


@pytest.mark.fault("thread died", "fetch")
def test_a_row_whose_reading_ends_the_rollout_thread_is_an_error_in_the_trainer() -> None:
    def leave(index: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit("no more rows")

    with (
        rolling(FakeEngine(), rows=Rows(leave), max_concurrent=1) as executor,
        pytest.raises(RolloutError, match=r"died: SystemExit\('no more rows'\)"),
    ):
        for version in range(9):
            executor.take()
            executor.publish([], version + 1)


@pytest.mark.fault("slow", "fetch")
def test_rows_that_are_slow_to_read_all_come_in_order() -> None:
    rows = Rows(lambda index: time.sleep(0.01), count=8)
    with rolling(FakeEngine(), rows=rows, num_epochs=1) as executor:
        taken: list[str] = []
        while batch := executor.take():
            taken += [group.row_id for group in batch]
            executor.publish([], executor.version + 1)
    assert taken == [f"row{i}" for i in range(8)]


# Resume -------------------------------------------------------------------------------------------


@pytest.mark.fault("hang", "resume")
@pytest.mark.fault("slow", "resume")
def test_groups_that_are_slow_to_go_on_after_a_resume_outlast_a_deadline_and_are_as_they_were():
    state, expected = halfway(Samples(max_new_tokens=8))
    engine = FakeEngine(reply=3, manual=True)
    with rolling(engine, Samples(max_new_tokens=8), start=False, **SETTINGS) as executor:
        resume(executor, state)
        engine.wait_for_requests(4)
        with pytest.raises(RolloutTimeout, match=r"waited 0.1 s for 1 groups: 0 are ready, 4 run"):
            executor.take(timeout_s=0.1)
        assert run_to_the_end(executor, engine) == expected


@pytest.mark.fault("thread died", "resume")
def test_a_repetition_that_ends_the_rollout_thread_is_an_error_in_the_trainer() -> None:
    class Leaves(Samples):
        async def run(self, row: Row, session: RolloutSession) -> list[Trajectory] | None:
            raise SystemExit("not again")

    state, _ = halfway(Samples(max_new_tokens=8))
    executor = make_executor(FakeEngine(), Leaves(), **SETTINGS)
    try:
        with pytest.raises(RolloutError, match=r"died: SystemExit\('not again'\)"):
            resume(executor, state)
            executor.take()
    finally:
        executor.close()
    assert "sdp-rollout" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.fault("corrupted data", "resume")
def test_a_checkpoint_of_which_half_is_there_is_an_error_before_anything_is_sampled(
    model_folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "it.ckpt"
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))
    trainer.save_checkpoint(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    engine = FakeEngine()
    again = make_trainer(sdp.WeightSyncCallback(), max_steps=2)
    with pytest.raises(sdp.CheckpointError, match="torn or damaged"):
        again.fit(make_module(model_folder), make_data(engine=engine), ckpt_path=path)
    assert engine.num_requests == 0


# Teardown -----------------------------------------------------------------------------------------


@pytest.mark.fault("exception", "teardown")
def test_an_engine_that_cannot_be_closed_is_an_error_and_rollouts_have_ended(
    model_folder: str,
) -> None:
    class Stays(FakeEngine):
        def close(self) -> None:
            super().close()
            raise EngineError("the server does not answer to its end")

    data = make_data(engine=Stays())
    with pytest.raises(EngineError, match="does not answer to its end"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(make_module(model_folder), data)
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = data.executor
    assert "sdp-rollout" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.fault("slow", "teardown")
def test_what_takes_a_while_to_clean_up_is_waited_for() -> None:
    runner, started, ended = (
        AsyncTaskRunner(name="slow-to-end"),
        threading.Event(),
        threading.Event(),
    )

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            ended.set()

    runner.submit(work)
    assert started.wait(DEADLINE_S)
    runner.close(DEADLINE_S)
    assert ended.is_set()


# Hangs in the trainer's thread --------------------------------------------------------------------


class Hang(Callback):
    """Hangs where it is told to, until the run has failed."""

    def __init__(self) -> None:
        self._over, self.has_begun = threading.Event(), False

    def on_train_start(self, *_: Any) -> None:
        self.has_begun = True

    def __call__(self) -> None:
        assert self._over.wait(DEADLINE_S), "nobody ended it"

    def on_exception(self, *_: Any) -> None:
        self._over.set()


def end_a_hang(folder: str, data: Any, hang: Hang, *callbacks: Callback, **settings: Any) -> None:
    module = settings.pop("module", None) or make_module(folder)
    dog = sdp.Watchdog(LIMIT_S, checkpoint_timeout_s=LIMIT_S, patience_s=DEADLINE_S)
    trainer = make_trainer(
        sdp.WeightSyncCallback(save_on_stop=False),  # or the same disk is asked once more
        *(dog, hang, *callbacks),
        **({"max_steps": 9} | settings),
    )
    with pytest.raises(sdp.SDPError, match="no sign of life for 3 s"):
        trainer.fit(module, data)
    assert "sdp-rollout" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.fault("hang", "fetch")
def test_a_row_that_is_never_read_ends_a_run_that_is_watched(
    model_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """No deadline of a batch helps: it is read under the lock that the trainer waits for."""
    hang = Hang()
    rows: Sequence[Row] = Rows(lambda index: hang() if index == 9 and hang.has_begun else None)
    data = make_data(rows=rows, engine=FakeEngine(), shuffle=False)
    end_a_hang(model_folder, data, hang)
    assert "in __getitem__" in capfd.readouterr().err


@pytest.mark.fault("hang", "score")
def test_a_score_that_never_comes_ends_a_run_that_is_watched(
    model_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hang = Hang()

    class Hangs(sdp.SegmentWisePPOModule):
        def score(self, trajectories: Sequence[Trajectory]) -> Any:
            hang()
            return super().score(trajectories)

    data = make_data(engine=FakeEngine(), max_head_lag=2)
    end_a_hang(model_folder, data, hang, AwaitIdleRollouts(), module=Hangs(model_folder))
    assert "in score" in capfd.readouterr().err


@pytest.mark.fault("hang", "checkpoint")
def test_a_disk_that_hangs_ends_a_run_that_is_watched(
    model_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hang = Hang()

    class Stuck(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            hang()

    settings: dict[str, Any] = {"enable_checkpointing": True, "plugins": [Stuck()]}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    end_a_hang(model_folder, make_data(engine=FakeEngine()), hang, saver, **settings)
    assert "in save_checkpoint" in capfd.readouterr().err
