"""The executor: generation goes on by itself, batches are bounded in lag, waits end."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from sdp_lightning.errors import ConfigError, RolloutError, RolloutTimeout, VersionError
from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, Row, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow
from support.rollouts import (
    Samples,
    lags,
    make_executor,
    make_group,
    rolling,
    wait_until,
)


class Scripted(Samples):
    """Samples, and then does what ``act`` says."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    async def run(self, row: Row, session: RolloutSession) -> Any:
        return await self.act(row, await super().run(row, session))


@pytest.mark.fault("slow", "queue")
def test_generation_goes_on_while_the_trainer_does_not_ask() -> None:
    with rolling(FakeEngine(), batch_size=2, max_head_lag=2) as executor:
        wait_until(executor, lambda: executor.stat.pending == 6)
        assert executor.stat.running == 0 and executor.manager.capacity(0) == 0
        executor.take()
        executor.publish([], 1)
        wait_until(executor, lambda: executor.stat.pending == 6)


def test_nothing_is_generated_before_the_first_publish_or_before_resume() -> None:
    engine = FakeEngine()
    with rolling(engine, start=False) as executor:
        for early in (executor.resume, executor.take, lambda: executor.version):
            with pytest.raises(VersionError, match="nothing was published yet"):
                early()
        executor.publish([], 3, reset=True)
        assert executor.version == 3 and executor.is_published and engine.num_requests == 0
        executor.resume()
        assert lags(executor.take() or [], 3) == [0, 0]


def test_a_paused_executor_submits_nothing_new_and_lets_running_groups_end() -> None:
    engine = FakeEngine(manual=True)
    with rolling(engine, batch_size=1, max_head_lag=1) as executor:
        engine.wait_for_requests(2)
        executor.pause()
        engine.advance(9, awaiting=2)
        wait_until(executor, lambda: executor.stat.pending == 2)
        executor.take()
        executor.publish([], 1)
        assert executor.stat.submitted == 2 and executor.manager.capacity(1) == 1
        executor.resume()
        engine.wait_for_requests(1)


@pytest.mark.parametrize("H", [0, 1, 2, 4])
@pytest.mark.parametrize("updates_in_flight", [True, False], ids=["in process", "server"])
def test_no_batch_holds_a_token_older_than_the_bound(H: int, updates_in_flight: bool) -> None:
    engine = FakeEngine(lambda r: 2 + r.seed % 5, chunks=2, updates_in_flight=updates_in_flight)
    with rolling(engine, Samples(2), max_head_lag=H) as executor:
        seen: set[int] = set()
        for version in range(25):
            batch = executor.take()
            assert batch is not None and len(batch) == 2
            seen |= set(lags(batch, version))
            executor.publish([], version + 1)
        assert max(seen) <= H and min(seen) >= 0 and (H > 0 or seen == {0})


def test_batches_are_the_oldest_groups_by_creation_whatever_finishes_first() -> None:
    engine = FakeEngine(manual=True)
    with rolling(engine, batch_size=2, max_head_lag=2) as executor:
        for index, num_running in ((5, 6), (3, 5), (1, 4)):
            engine.advance(9, only=index, awaiting=num_running)
        wait_until(executor, lambda: executor.stat.pending == 3)
        first = executor.take()
        engine.advance(9, awaiting=3)
        wait_until(executor, lambda: executor.stat.pending == 4)
        second = executor.take()
    assert [[g.order for g in b or []] for b in (first, second)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("last_batch", "expected", "pending"),
    [("short", ["row4"], 0), ("fill", ["row4", "row0"], 0), ("drop", None, 1)],
)
def test_the_last_groups_of_the_epochs_are_a_batch_as_configured(
    last_batch: str, expected: list[str] | None, pending: int
) -> None:
    engine = FakeEngine()
    with rolling(engine, rows=5, num_epochs=1, last_batch=last_batch) as executor:
        for version in range(2):
            assert [g.row_id for g in executor.take() or ()] == [
                f"row{2 * version + i}" for i in range(2)
            ]
            executor.publish([], version + 1)
        batch = executor.take()
        assert (batch and [group.row_id for group in batch]) == expected
        assert executor.stat.pending == pending
        assert executor.take() is None and executor.stat.submitted == 5 + (last_batch == "fill")


def test_a_rank_that_has_no_group_left_fills_a_batch_when_it_is_asked_to() -> None:
    settings = {"num_epochs": 1, "last_batch": "fill", "max_head_lag": 0}
    script = {"row0": "reject"}  # also of the epoch that fills
    workflow = Samples(script=lambda row: script.get(row["id"]))
    with rolling(FakeEngine(), workflow, rows=3, **settings) as executor:
        assert len(executor.take() or ()) == 2
        executor.publish([], 1)
        assert executor.take() is None
        assert [group.row_id for group in executor.take(fill=True) or ()] == ["row1", "row2"]
        assert executor.stat.rejected == 2


@pytest.mark.fault("hang", "queue")
def test_a_rejected_rollout_never_makes_a_wait_hang() -> None:
    """Fault: wait(n) that counts only accepted results and hangs on rejects."""
    script = Samples(script=lambda row: "reject" if int(row["id"][3:]) % 3 else None)
    with rolling(FakeEngine(), script) as executor:
        assert [g.row_id for g in executor.take() or []] == ["row0", "row3"]
        assert executor.stat.rejected >= 2
        assert executor.telemetry.rejections == {
            "the workflow returned None": executor.stat.rejected
        }


class Returns(RolloutWorkflow):
    """Returns the same thing for every row."""

    sampling = Samples().sampling

    def __init__(self, value: Any) -> None:
        self.value = value

    async def run(self, row: Row, session: RolloutSession) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned None"),
        ([], "returned no trajectories"),
        ([Trajectory((Context([1]),))], "a trajectory has no sampled tokens"),
        ([*make_group([0]).trajectories, Trajectory((Context([1]),))], "has no sampled tokens"),
    ],
    ids=["None", "an empty list", "a trajectory without samples", "a last one without samples"],
)
@pytest.mark.fault("hang", "queue")
def test_endless_rejection_is_an_error_that_names_the_reason(value: Any, reason: str) -> None:
    with rolling(FakeEngine(), Returns(value), max_rejected_in_a_row=7) as executor:
        with pytest.raises(RolloutError, match=rf"7 groups in a row were rejected.*{reason}"):
            executor.take()
        stat = executor.stat
        assert stat.rejected == stat.submitted - stat.running >= 7


def test_an_accepted_group_begins_the_count_of_rejections_anew() -> None:
    script = Samples(script=lambda row: "reject" if int(row["id"][3:]) % 4 else None)
    settings = {"max_rejected_in_a_row": 4, "max_concurrent": 1}
    with rolling(FakeEngine(), script, **settings) as executor:
        for version in range(4):
            executor.take()
            executor.publish([], version + 1)
        assert executor.stat.consumed == 8 and executor.stat.rejected >= 7 * 3


@pytest.mark.fault("exception", "generate")
def test_a_failed_rollout_frees_its_slot_and_is_named_with_row_version_and_cause() -> None:
    """Faults: an exception leaks its slot; failure reported as success; no client timeout."""

    def script(row: Row) -> None:
        if row["id"] == "row1":
            raise KeyError("lost")

    with rolling(FakeEngine(), Samples(script=script), version=5) as executor:
        message = r"the rollout of row 'row1', submitted at version 5, failed: KeyError: 'lost'"
        with pytest.raises(RolloutError, match=message) as caught:
            while True:
                executor.take()
                executor.publish([], executor.version + 1)
        assert isinstance(caught.value.__cause__, KeyError)
        assert executor.stat.failed == 1


@pytest.mark.fault("exception", "generate")
def test_max_failures_are_counted_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def script(row: Row) -> None:
        if row["id"] in ("row0", "row1"):
            raise KeyError(row["id"])

    caplog.set_level(logging.WARNING)
    with rolling(FakeEngine(), Samples(script=script), max_failures=2) as executor:
        assert [g.row_id for g in executor.take() or []] == ["row2", "row3"]
        assert executor.stat.failed == 2
    assert "max_failures=2" in caplog.text


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit("out")], ids=["own", "die"])
@pytest.mark.fault("thread died", "queue", only="die")
@pytest.mark.fault("thread died", "teardown", only="die")
@pytest.mark.fault("exception", "generate", only="own")
def test_a_workflow_that_cancels_itself_or_exits_is_an_error_too(error: BaseException) -> None:
    """Fault: an error that is no Exception leaks the slot, and the trainer waits for ever."""

    async def act(row: Row, result: Any) -> Any:
        raise error

    with rolling(FakeEngine(), Scripted(act), start=False) as executor:
        executor.publish([], 0, reset=True)
        with pytest.raises(RolloutError, match=r"CancelledError|died: SystemExit"):
            executor.resume()
            executor.take()


@pytest.mark.fault("corrupted data", "queue")
def test_malformed_results_are_an_error_that_names_the_row() -> None:
    """Fault: broad except and keep."""
    for value in ([1, 2], make_group([9]).trajectories):
        with (
            rolling(FakeEngine(), Returns(value)) as executor,
            pytest.raises(RolloutError, match="row 'row0'"),
        ):
            executor.take()


@pytest.mark.fault("exception", "fetch")
def test_a_row_that_cannot_be_read_reaches_the_trainer() -> None:
    class Broken(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("disk")

    with (
        rolling(FakeEngine(), rows=Broken([{}])) as executor,
        pytest.raises(RolloutError, match="reading row 0 of the prompts failed"),
    ):
        executor.take()


@pytest.mark.fault("hang", "generate")
@pytest.mark.fault("hang", "queue")
def test_at_the_deadline_the_error_says_where_everything_is_and_nothing_is_lost() -> None:
    engine = FakeEngine(reply=3, manual=True)
    with rolling(engine, batch_size=2, max_head_lag=1, max_concurrent=3) as executor:
        engine.advance(9, only=0, awaiting=3)
        wait_until(executor, lambda: (executor.stat.pending, executor.stat.running) == (1, 3))
        with pytest.raises(RolloutTimeout) as caught:
            executor.take(timeout_s=0.0)
        assert str(caught.value) == (
            "waited 0.0 s for 2 groups: 1 are ready, 3 run, 0 were dropped, 0 rejected and 0 "
            "failed so far; capacity is 0 at version 0; the engine has sampled 3 tokens."
        )
        engine.advance(9, awaiting=3)
        assert len(executor.take() or []) == 2


def test_zero_seconds_return_what_is_ready_at_once() -> None:
    """Fault: `x or default` where x may be 0."""
    with rolling(FakeEngine()) as executor:
        wait_until(executor, lambda: executor.stat.pending == 6)
        assert len(executor.take(timeout_s=0) or []) == 2


def test_a_signal_ends_the_wait_without_loss() -> None:
    engine = FakeEngine(manual=True)
    with rolling(engine) as executor:
        with pytest.raises(RolloutTimeout, match="interrupted while waiting for 2 groups"):
            executor.take(interrupted=lambda: True)
        engine.advance(9, awaiting=6)
        assert len(executor.take() or []) == 2


@pytest.mark.parametrize("how", ["close", "engine fails"])
@pytest.mark.fault("exception", "queue")
def test_a_waiting_trainer_is_woken(how: str) -> None:
    engine = FakeEngine(manual=True)
    with rolling(engine) as executor:
        engine.wait_for_requests(6)
        act = executor.close if how == "close" else lambda: engine.fail("out of memory")
        threading.Timer(0, act).start()
        with pytest.raises(RolloutError, match=r"closed|out of memory"):
            executor.take()


def test_an_executor_that_never_started_or_failed_closes() -> None:
    executor = make_executor(FakeEngine())
    executor.close()
    executor.close()
    with rolling(FakeEngine()) as executor:
        executor.close()
        executor.resume()
        with pytest.raises(RolloutError, match="closed"):
            executor.take()


@pytest.mark.fault("exception", "queue")
def test_a_row_whose_submission_fails_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an input popped before its submit fails."""
    with rolling(FakeEngine(), start=False) as executor:
        executor.publish([], 0, reset=True)

        def refuse(*args: Any) -> int:
            raise RolloutError("full")

        with monkeypatch.context() as patched:
            patched.setattr(executor.runner, "submit", refuse)
            with pytest.raises(RolloutError, match="full"):
                executor.resume()
        assert executor.stat.submitted == 0
        executor.resume()
        assert [g.row_id for g in executor.take() or []] == ["row0", "row1"]


def test_nothing_grows_with_the_number_of_requests() -> None:
    """Fault: sessions, sockets or result stores that grow per request."""
    with rolling(FakeEngine()) as executor:
        for version in range(60):
            executor.take()
            executor.publish([], version + 1)
        wait_until(executor, lambda: executor.stat.running == 0)
        assert len(executor.registry.snapshot()) == executor.stat.pending <= 6
        assert executor.gate.num_outstanding == 0 and not executor.runner._results


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompts is empty"):
        make_executor(FakeEngine(), rows=0)
    assert PromptRow(0, 3, {}).row_id == "3"
