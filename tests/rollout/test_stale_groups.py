"""Groups that go stale at a commit: dropped, waited for, masked, or kept."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sdp_lightning.errors import RolloutTimeout
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.testing import FakeEngine
from support.rollouts import (
    DEADLINE_S,
    Samples,
    assert_conserved,
    rolling,
    wait_until,
)


def step(executor: WorkflowExecutor) -> int:
    """Publish the next version without a batch between."""
    executor.publish([], executor.version + 1)
    return executor.version


def finish_newest(executor: WorkflowExecutor, engine: FakeEngine, *, awaiting: int) -> None:
    """Let the last of so many requests end, and wait until its group has."""
    engine.advance(99, only=awaiting - 1, awaiting=awaiting)
    wait_until(executor, lambda: executor.stat.pending > 0)


@pytest.mark.fault("slow", "generate")
def test_a_running_group_beyond_the_bound_is_cancelled_and_counted_dropped_at_the_commit() -> None:
    engine = FakeEngine(reply=4, manual=True)
    with rolling(engine, batch_size=1, max_head_lag=1, max_concurrent=2) as executor:
        engine.advance(1, only=0, awaiting=2)
        step(executor)
        assert executor.stat.dropped == 0, "lag 1 is within the bound"
        step(executor)
        assert executor.stat.dropped == 1 and executor.telemetry.num_overdue == 1
        assert executor.telemetry.dropped_tokens == 1
        assert_conserved(executor)
        engine.wait_for_requests(2, total=3)  # cancelled, and another row took its place
        engine.advance(99, awaiting=2)
        (group,) = executor.take() or []
        assert group.row_id == "row1"


@pytest.mark.fault("slow", "generate")
def test_what_finishes_stale_is_dropped_when_it_finishes() -> None:
    engine = FakeEngine(reply=2, manual=True)
    go_on = threading.Event()

    def late(row: Any) -> None:
        if row["id"] == "row0":
            go_on.wait(DEADLINE_S)

    class Late(Samples):
        async def run(self, row: Any, session: Any) -> Any:
            result = await super().run(row, session)
            await asyncio.to_thread(late, row)
            return result

    # Not overdue while it runs: only a finished group is stale for want of a proximal.
    config = {"batch_size": 1, "max_head_lag": 2, "missing_proximal": "drop", "rows": 1}
    with rolling(engine, Late(), num_epochs=1, **config) as executor:
        engine.advance(9, awaiting=1)
        engine.wait_for_requests(0)
        for _ in range(2):
            step(executor)
        assert executor.stat.running == 1 and executor.stat.dropped == 0
        go_on.set()
        wait_until(executor, lambda: executor.stat.dropped == 1)


@pytest.mark.parametrize("requeue", [False, True])
def test_a_dropped_row_comes_again_only_if_asked(requeue: bool) -> None:
    engine = FakeEngine(manual=True)
    settings = {"batch_size": 1, "max_head_lag": 1, "rows": 4, "num_epochs": 1}
    with rolling(engine, requeue_dropped=requeue, **settings) as executor:
        trained: list[str] = []
        for _ in range(2):  # row0 has its first token at version 0, others overtake it
            engine.advance(1, only=0, awaiting=2)
            engine.advance(9, only=1, awaiting=2)
            trained += [group.row_id for group in executor.take() or []]
            step(executor)
        assert executor.stat.dropped == 1
        engine.wait_for_requests(2 if requeue else 1, total=5 if requeue else 4)
        engine.advance(9, awaiting=2 if requeue else 1)
        while batch := executor.take():
            trained += [group.row_id for group in batch]
            step(executor)
        assert trained == ["row1", "row2"] + (["row0"] if requeue else []) + ["row3"]


def test_waiting_groups_beyond_the_bound_are_purged_once_and_free_their_capacity() -> None:
    with rolling(FakeEngine(), batch_size=2, max_head_lag=0) as executor:
        wait_until(executor, lambda: executor.stat.pending == 2)
        step(executor)
        assert executor.stat.dropped == 2 and executor.telemetry.num_overdue == 0
        wait_until(executor, lambda: executor.stat.pending == 2)
        assert executor.stat.dropped == 2, "a second look drops nothing"
        assert len(executor.take() or []) == 2


def test_under_wait_no_batch_is_handed_out_that_would_strand_an_older_group() -> None:
    """H=2, B=1: rows 0 to 2 start at version 0, so the third one must be trained at 2."""
    engine = FakeEngine(reply=2, manual=True)
    settings = {"batch_size": 1, "max_head_lag": 2, "on_overdue": "wait"}
    with rolling(engine, **settings) as executor:
        engine.advance(1, awaiting=3)  # all have a token of version 0
        finish_newest(executor, engine, awaiting=3)
        assert [g.order for g in executor.take(timeout_s=0) or []] == [2]
        step(executor)
        finish_newest(executor, engine, awaiting=3)  # row 3, of version 1
        with pytest.raises(RolloutTimeout):
            executor.take(timeout_s=0)  # taking row 3 now would strand row 0 or row 1
        engine.advance(9, only=1, awaiting=2)
        assert [g.order for g in executor.take() or []] == [1]
        step(executor)
        with pytest.raises(RolloutTimeout):
            executor.take(timeout_s=0)
        engine.advance(9, only=0, awaiting=2)  # row 4 has come
        assert [g.order for g in executor.take() or []] == [0]
        step(executor)
        assert executor.stat.dropped == 0


def test_under_mask_a_group_is_kept_while_its_newest_token_is_within_the_bound() -> None:
    engine = FakeEngine(reply=4, manual=True)
    settings = {"batch_size": 1, "max_head_lag": 1, "max_concurrent": 1, "on_overdue": "mask"}
    with rolling(engine, **settings) as executor:
        for _ in range(3):
            engine.advance(1, awaiting=1)
            step(executor)
        engine.advance(9, awaiting=1)
        (group,) = executor.take() or []
        assert [s.version for s in group.segments] == [0, 1, 2, 3]
        assert executor.stat.dropped == 0


def test_the_standard_mode_drops_nothing_however_old() -> None:
    engine = FakeEngine(reply=4, manual=True)
    settings = {"batch_size": 1, "max_head_lag": 1, "enable_segment_wise_ppo": False}
    with rolling(engine, **settings) as executor:
        engine.advance(1, awaiting=2)
        for _ in range(6):
            step(executor)
        assert executor.stat.dropped == 0
        engine.advance(9, awaiting=2)
        wait_until(executor, lambda: executor.stat.pending >= 2)
        assert [g.head_version for g in executor.take() or []] == [0]
