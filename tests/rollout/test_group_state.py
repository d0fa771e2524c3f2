"""What an executor saves, and that every row is accounted for once after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import FakeEngine
from support.checkpoints import content, finished, pending_in, running_in, through_a_file
from support.rollouts import (
    Samples,
    VersionScorer,
    assert_conserved,
    make_executor,
    rolling,
    wait_until,
)

SETTINGS = {"batch_size": 2, "max_head_lag": 3, "rows": 40}


def test_pending_groups_come_back_as_they_were_with_their_scores() -> None:
    engine = FakeEngine(manual=True)
    with rolling(engine, Samples(2), **SETTINGS) as executor:
        engine.advance(2, awaiting=8)
        executor.publish([], 1)
        executor.recompute(VersionScorer())
        engine.advance(9, awaiting=8)
        engine.advance(9, awaiting=8)  # the second samples
        wait_until(executor, lambda: executor.stat.pending == 8)
        state = through_a_file(executor.state_dict())
        before = finished(executor)
    with rolling(FakeEngine(manual=True), start=False, **SETTINGS) as restored:
        restored.load_state_dict(state)
        after = finished(restored)
        assert [content(g) for g in after] == [content(g) for g in before]
        scored = [s for g in after for s in g.segments if s.proximal.is_set]
        assert len(scored) == 8 and all(s.proximal.version == 1 for s in scored)
        assert all(np.array_equal(s.proximal.logprobs, [-1.0, -1.0]) for s in scored)  # type: ignore[arg-type]
        restored.publish([], 1, reset=True)
        batch = restored.take() or []
        assert [content(g) for g in batch] == [content(g) for g in before[:2]]


def test_rows_in_flight_are_submitted_again_first_and_none_is_lost_or_trained_twice() -> None:
    """Fault: prompts in flight lost on resume; a step counted twice."""
    engine = FakeEngine(manual=True)
    rows: dict[str, list[str]] = {"trained": []}
    with rolling(engine, num_epochs=1, **SETTINGS) as executor:
        for version in (1, 2):
            for num_running in (8, 7):
                engine.advance(9, only=3, awaiting=num_running)  # out of order
            rows["trained"] += [g.row_id for g in executor.take() or []]
            executor.publish([], version)
        engine.advance(9, only=5, awaiting=8)
        wait_until(executor, lambda: executor.stat.pending == 1)
        before = [(x.order, x.row.row_id) for x in executor.registry.snapshot()]
        state = through_a_file(executor.state_dict())
    with rolling(FakeEngine(), start=False, num_epochs=1, **SETTINGS) as executor:
        executor.load_state_dict(state)
        executor.publish([], 2, reset=True)
        executor.resume()
        live = sorted(executor.registry.snapshot(), key=lambda x: x.order)
        assert len({x.order for x in live}) == len(live), "orders are never used twice"
        assert [(x.order, x.row.row_id) for x in live][:8] == sorted(before), "places are kept"
        while batch := executor.take():
            rows["trained"] += [g.row_id for g in batch]
            executor.publish([], executor.version + 1)
    assert sorted(rows["trained"]) == sorted(f"row{i}" for i in range(40))


def test_groups_in_the_trainers_hands_are_saved_as_pending() -> None:
    with rolling(FakeEngine(), **SETTINGS) as executor:
        wait_until(executor, lambda: executor.stat.pending == 8)
        taken = [g.row_id for g in executor.take() or []]
        state = executor.state_dict()
        assert [saved["row_id"] for saved in pending_in(state)][:2] == taken
        executor.publish([], 1)
        state = executor.state_dict()
        assert not set(taken) & {saved["row_id"] for saved in pending_in(state)}


@pytest.mark.parametrize("batch_size", [2, 1], ids=["the same batch size", "another one"])
def test_after_a_resume_capacity_is_that_of_a_fresh_run_less_what_came_back(
    batch_size: int,
) -> None:
    """Fault: capacity restored wrongly after resume."""
    engine = FakeEngine(manual=True)
    with rolling(engine, **SETTINGS) as executor:
        for num_running in (8, 7, 6):
            engine.advance(9, only=0, awaiting=num_running)
        wait_until(executor, lambda: executor.stat.pending == 3)
        state = through_a_file(executor.state_dict())
    settings = SETTINGS | {"batch_size": batch_size, "max_concurrent": 100}
    engine, H, V, P = FakeEngine(manual=True), 3, 1, 3
    with rolling(engine, start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], V, reset=True)
        stat = executor.stat
        assert (stat.consumed, stat.pending, stat.running) == (V * batch_size, P, 0)
        assert executor.manager.capacity(V) == (H + 1) * batch_size - P
        executor.resume()
        R = (H + 1) * batch_size - P
        assert executor.stat.running == R and executor.manager.capacity(V) == 0
        assert_conserved(executor)


def test_stale_groups_of_a_checkpoint_are_dropped_at_the_start() -> None:
    with rolling(FakeEngine(), **SETTINGS) as executor:
        wait_until(executor, lambda: executor.stat.pending == 8)
        state = through_a_file(executor.state_dict())
    with rolling(FakeEngine(manual=True), start=False, **SETTINGS) as executor:
        executor.load_state_dict(state)
        executor.publish([], 4, reset=True)
        assert executor.stat.dropped == 8 and executor.manager.capacity(4) == 8


@pytest.mark.fault("corrupted data", "resume")
def test_a_state_comes_before_the_first_publish_and_fits_the_rows() -> None:
    with rolling(FakeEngine(), **SETTINGS) as executor:
        state = executor.state_dict()
        with pytest.raises(ConfigError, match="before the first publish"):
            executor.load_state_dict(state)
    other = make_executor(FakeEngine(), rows=3)
    with pytest.raises(ConfigError, match="made with 40 prompts, now there are 3"):
        other.load_state_dict(state)
    other.close()


def test_a_state_holds_plain_types_and_tensors_only(tmp_path: Path) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            [check(v) for v in value.values()]
        elif isinstance(value, list):
            [check(v) for v in value]
        else:
            assert value is None or type(value) in (str, int, float, bool, torch.Tensor), value

    engine = FakeEngine(manual=True)
    with rolling(engine, **SETTINGS) as executor:
        engine.advance(1, awaiting=8)
        executor.publish([], 1)
        executor.recompute(VersionScorer())
        for _ in range(3):  # version 1 has room for one more whenever one ends
            engine.advance(9, only=0, awaiting=8)
        wait_until(executor, lambda: executor.stat.pending == 3)
        state = executor.state_dict()
        assert len(pending_in(state)) == 3 and len(running_in(state)) >= 5
        check(state)
