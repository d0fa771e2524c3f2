"""A publish beside the next step: the clock, the windows of scoring, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.lightning.phase_timer import PHASES
from sdp_lightning.testing import FakeEngine
from support.rollouts import VersionScorer, assert_conserved, lags, rolling, wait_until
from support.staging_engine import StagingEngine
from support.trainers import (
    Recorder,
    executor_of,
    make_data,
    make_module,
    make_rows,
    make_trainer,
)

OVERLAP: dict[str, Any] = {"overlap_publish": True, "batch_size": 1, "max_concurrent": 3}


def test_the_trainer_goes_on_at_the_next_version_while_servers_sample_the_one_before() -> None:
    engine = StagingEngine(reply=2, manual=True)
    with rolling(engine, max_head_lag=2, **OVERLAP) as executor:
        engine.held = True
        engine.advance(2, awaiting=3, only=0)
        assert executor.take() is not None
        engine.wait_for_requests(2)
        executor.publish([], 1)
        assert executor.version == 1 and engine.version == 0
        assert executor.publisher.is_under_way
        wait_until(executor, lambda: engine._paused)
        engine.let_load()
        executor.publisher.finish()
        assert engine.version == 1 and engine.events == ["stage 0", "load 0", "stage 1", "load 1"]
        engine.advance(2, awaiting=3)  # and one more, by the capacity of version 1
        [group] = executor.take() or []
        assert {s.version for s in group.segments} <= {0, 1} and max(lags([group], 1)) <= 1


def test_rows_are_submitted_by_the_version_that_samples_them() -> None:
    """Fault: groups of the version before are submitted as if they were of the next one."""
    engine = StagingEngine(reply=2, manual=True)
    with rolling(engine, max_head_lag=1, overlap_publish=True, batch_size=1) as executor:
        engine.advance(2, awaiting=2)  # (H + 1) * B groups at version 0
        assert executor.take() is not None
        engine.held = True
        executor.publish([], 1)
        assert executor.manager.capacity(1) == 1 and executor.stat.running == 0
        [group] = executor.take() or []  # sampled before the load, trained on beside it
        assert lags([group], executor.version) == [1]
        assert executor.stat.submitted == 2, "no row is submitted at 1 before 1 is served"
        engine.let_load()
        executor.publisher.finish()
        wait_until(executor, lambda: executor.stat.submitted == 4 - 1)


def test_no_segment_misses_its_window_because_of_a_publish_beside_the_step() -> None:
    engine, scorer = StagingEngine(reply=9, manual=True), VersionScorer()
    settings = {"max_head_lag": 4, "overlap_publish": True, "batch_size": 1, "max_concurrent": 2}
    with rolling(engine, **settings) as executor:
        for version in range(1, 4):
            engine.advance(1, awaiting=2)  # closed by the pause, after publish() has returned
            engine.held = True
            executor.publish([], version)
            engine.let_load()
            report = executor.recompute(scorer)  # waits for it
            assert (report.num_segments, engine.version) == (2, version)
        parts = [part for x in executor.registry.snapshot() for p in x.parts for part in p]
        segments = [part for part in parts if isinstance(part, sdp.Segment)]
        assert [s.proximal.version for s in segments] == [1, 2, 3] * 2


@pytest.mark.fault("exception", "publish")
@pytest.mark.parametrize("then", ["take", "publish", "score", "evaluate", "finish"])
def test_a_failed_publish_is_the_error_of_whatever_comes_next(then: str) -> None:
    """And a checkpoint that comes before that is whole, at the version of the trainer's weights."""
    engine = StagingEngine(reply=2, manual=True)
    with rolling(engine, max_head_lag=2, **OVERLAP) as executor:
        engine.advance(1, awaiting=3)
        engine.fails = "the server is gone"
        executor.publish([], 1)
        state = executor.state_dict()
        assert len(state["running"]["row_ids"]) == 3 and executor.version == 1
        assert engine.version == 0 and engine._paused and not executor.gate._is_open
        assert_conserved(executor)
        actions = {
            "take": executor.take,
            "publish": lambda: executor.publish([], 2),
            "score": lambda: executor.recompute(VersionScorer()),
            "evaluate": lambda: executor.evaluate([{"id": "x"}], executor.workflow),
            "finish": executor.publisher.finish,
        }
        for _ in range(2):
            with pytest.raises(sdp.errors.EngineError, match="the server is gone"):
                actions[then]()
        assert "stage 2" not in engine.events


def test_whatever_ends_a_publish_beside_the_step_nobody_waits_for_it_for_ever() -> None:
    engine = StagingEngine()
    with rolling(engine, max_head_lag=1, **OVERLAP) as executor:
        engine.fails = SystemExit("at its exit")
        executor.publish([], 1)
        with pytest.raises(sdp.errors.EngineError, match=r"ended by SystemExit\('at its exit'\)"):
            executor.publisher.finish()


@pytest.mark.fault("exception", "publish")
def test_weights_that_cannot_be_staged_commit_nothing() -> None:
    def broken() -> Any:
        raise sdp.errors.EngineError("out of memory")
        yield

    with rolling(StagingEngine(), max_head_lag=1, **OVERLAP) as executor:
        with pytest.raises(sdp.errors.EngineError, match="out of memory"):
            executor.publish(broken(), 1)
        assert executor.version == 0 and not executor.publisher.is_under_way
        executor.publish([], 1)


def test_what_cannot_overlap_is_refused_with_the_remedy() -> None:
    with pytest.raises(sdp.ConfigError, match="set max_head_lag to 1 or more"):
        sdp.RolloutConfig(overlap_publish=True, max_head_lag=0)
    with (
        pytest.raises(sdp.ConfigError, match="for engines of servers; FakeEngine samples in this"),
        rolling(FakeEngine(), max_head_lag=1, **OVERLAP),
    ):
        pass
    live = StagingEngine()
    live.stages_copies = False
    with (
        pytest.raises(sdp.ConfigError, match="transport='files', 'tcp', 'delta' or 'lora'"),
        rolling(live, max_head_lag=1, **OVERLAP),
    ):
        pass


class LetLoad(Recorder):
    """Lets every publish load in the middle of the next step, before the weights move."""

    def __init__(self, engine: StagingEngine) -> None:
        super().__init__()
        self.engine, self.beside = engine, list[bool]()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.beside.append(self.engine.version == batch.version - 1)
        if batch.version:
            self.engine.let_load()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if executor_of(trainer).version == 5:
            self.engine.let_load()


def test_a_fit_trains_beside_its_publishes_and_ends_with_the_last_one(
    model_folder: str, tmp_path: Path
) -> None:
    engine = StagingEngine()
    engine.held = True
    recorder = LetLoad(engine)
    data = make_data(
        rows=make_rows(64), engine=engine, max_head_lag=2, batch_size=1, overlap_publish=True
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=5)
    trainer.fit(make_module(model_folder), data)
    assert engine.version == 5 and [s.batch.version for s in recorder.steps] == list(range(5))
    assert recorder.beside == [False, True, True, True, True]
    assert [metrics["rollout/version"] for metrics in recorder.metrics] == [1, 2, 3, 4, 5]
    assert recorder.metrics[-1]["bridge/approximated_share"] == 0.0
    for metrics in recorder.metrics:
        phases = sum(metrics[f"time/{phase}_s"] for phase in PHASES)
        assert phases <= metrics["time/step_s"]
