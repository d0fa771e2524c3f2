"""Evaluation: rollouts that are judged, outside of ledger and capacity."""

from __future__ import annotations

import pytest

from sdp_lightning.errors import RolloutError, RolloutTimeout
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Row
from support.rollouts import (
    DEADLINE_S,
    Samples,
    rolling,
    versions,
    wait_until,
)


def test_evaluation_spends_no_capacity_and_moves_nothing() -> None:
    """Fault: final evaluation waiting for a policy that never comes."""
    engine = FakeEngine()
    with rolling(engine, rows=4, num_epochs=1) as executor:
        wait_until(executor, lambda: executor.stat.pending == 4)
        before = executor.stat
        rows: list[Row] = [{"id": f"e{i}"} for i in range(5)]
        script = Samples(2, script=lambda row: "reject" if row["id"] == "e3" else None)
        groups = executor.evaluate(rows, script)
        assert [g.row_id for g in groups] == ["e0", "e1", "e2", "e4"]
        assert all(versions(t) == [0] for g in groups for t in g.trajectories)
        assert executor.stat == before and executor.version == 0
        assert executor.evaluate([], script) == []


def test_an_evaluation_that_fails_or_hangs_is_an_error_and_training_goes_on() -> None:
    def script(row: Row) -> None:
        raise KeyError("lost")

    with rolling(FakeEngine(), max_failures=0) as executor:
        with pytest.raises(RolloutError, match=r"evaluating row 'e' failed: KeyError"):
            executor.evaluate([{"id": "e"}], Samples(script=script))
        assert executor.take() is not None
    engine = FakeEngine(manual=True)
    with rolling(engine) as executor:
        with pytest.raises(RolloutTimeout, match="waited 0 s for 1 results"):
            executor.evaluate([{"id": "e"}], Samples(), timeout_s=0)
        engine.advance(9, awaiting=6)
        assert executor.take(DEADLINE_S) is not None
