"""A version's life: gate, pause, drain, update, commit, purge, resume; and groups that go stale."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.errors import EngineError, RolloutTimeout, VersionError
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import FinishReason, Segment
from support.rollouts import (
    DEADLINE_S,
    RecordingEngine,
    Samples,
    rolling,
    versions,
)


def step(executor: WorkflowExecutor) -> int:
    """Publish the next version without a batch between."""
    executor.publish([], executor.version + 1)
    return executor.version


def test_a_server_is_updated_with_nothing_in_flight_and_sends_wait_for_the_end() -> None:
    """Faults: weights reloaded under running requests; a request sent before a pause and admitted
    after it is stamped with the old version."""
    engine = RecordingEngine(reply=4, manual=True, updates_in_flight=False)
    with rolling(engine, max_head_lag=1, batch_size=1, max_concurrent=9) as executor:
        engine.advance(1, awaiting=2)
        engine.events.clear()
        step(executor)
        engine.wait_for_requests(3)
        order = ["pause", "update 1 with 0 in flight", "resume", *["generate"] * 3]
        assert engine.events == order, "gate closed until after the resume"
        parts = [group.parts for group in executor.registry.snapshot()][:2]
        assert all(isinstance(p[0][1], Segment) and p[0][1].version == 0 for p in parts)
        engine.advance(99, awaiting=3)
        (group,) = executor.take() or []
        assert [(s.version, len(s)) for s in group.segments] == [(0, 1), (1, 3)]


def test_in_process_requests_go_on_across_an_update() -> None:
    engine = RecordingEngine(reply=4, manual=True)
    with rolling(engine, batch_size=1, max_head_lag=0) as executor:
        engine.wait_for_requests(1)
        engine.events.clear()
        executor.publish([], 1)
        assert engine.events[:3] == ["pause", "update 1 with 1 in flight", "resume"]


def test_when_a_publish_returns_every_interrupted_token_is_in_its_episode() -> None:
    for updates_in_flight in (True, False):
        engine = FakeEngine(reply=9, manual=True, updates_in_flight=updates_in_flight)
        with rolling(engine, Samples(1, max_new_tokens=9), max_head_lag=3) as executor:
            for version in range(1, 4):
                engine.advance(1, awaiting=8)
                step(executor)
                sampled = sum(group.num_sampled for group in executor.registry.snapshot())
                assert sampled == engine.num_generated, f"updates_in_flight={updates_in_flight}"
                assert executor.version == version


@pytest.mark.parametrize("updates_in_flight", [True, False])
def test_a_publish_reports_how_long_nothing_was_sampled_and_the_trainer_waited(
    updates_in_flight: bool,
) -> None:
    class Slow(FakeEngine):
        def update_weights(self, weights: Any, version: int, *, reset: bool = False) -> Any:
            time.sleep(0.02)
            return super().update_weights(weights, version, reset=reset)

        def pause(self) -> None:
            super().pause()
            time.sleep(0.01)

    with rolling(
        Slow(updates_in_flight=updates_in_flight), max_head_lag=1, batch_size=1
    ) as executor:
        start = time.monotonic()
        report = executor.publish([], 1)
        assert 0.03 <= report.paused_s <= report.exposed_s <= time.monotonic() - start


class Straggling(FakeEngine):
    """The first request does not notice the pause: it has to be cancelled."""

    def __init__(self) -> None:
        super().__init__(updates_in_flight=False)
        self.hung, self.num_hung = threading.Event(), 0

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        if not self.hung.is_set():
            self.hung.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.num_hung += 1
        return await super().generate(request, sink)


@pytest.mark.fault("hang", "generate")
@pytest.mark.fault("slow", "publish")
def test_a_straggler_is_cancelled_past_drain_s_and_its_request_resent() -> None:
    """Fault: a hung server with no client timeout."""
    engine = Straggling()
    with rolling(engine, batch_size=1, max_head_lag=1, drain_s=0.01) as executor:
        assert engine.hung.wait(DEADLINE_S)
        step(executor)
        assert engine.num_hung == 1
        for _ in range(3):
            (group,) = executor.take() or []
            if group.order == 0:
                break
        assert group.order == 0 and [s.version for s in group.segments] == [1]


class Stubborn(FakeEngine):
    """Its requests neither end nor can be cancelled, until released."""

    def __init__(self) -> None:
        super().__init__(updates_in_flight=False)
        self.out, self.release = threading.Event(), threading.Event()

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        self.out.set()
        while not self.release.is_set():
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                continue
        return "stop"


@pytest.mark.fault("hang", "publish")
def test_a_drain_that_cannot_end_is_an_error_and_the_engine_stays_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdp_lightning.workflows.send_gate.CANCEL_S", 0.05)
    engine = Stubborn()
    with rolling(engine, batch_size=1, max_head_lag=0, drain_s=0.01) as executor:
        assert engine.out.wait(DEADLINE_S)
        with pytest.raises(RolloutTimeout, match="ignores cancellation"):
            step(executor)
        assert engine.version == 0 and executor.version == 0 and engine._paused
        engine.release.set()


class Failing(RecordingEngine):
    """Its next update fails, or takes another version than asked."""

    how = ""

    def update_weights(self, weights: Any, version: int, *, reset: bool = False) -> Any:
        if self.how == "error":
            self.fail("transfer failed")
        if self.how == "other version":
            return super().update_weights(weights, version + 5, reset=True)
        return super().update_weights(weights, version, reset=reset)


@pytest.mark.parametrize("updates_in_flight", [True, False])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("error", EngineError, "transfer failed"),
        ("other version", VersionError, "version 1 was published, but the engine reports 6"),
    ],
)
@pytest.mark.fault("exception", "publish", only="^error-")
@pytest.mark.fault("corrupted data", "publish", only="^other version-")
def test_a_failed_publish_raises_commits_nothing_and_leaves_the_engine_paused(
    how: str, error: type[Exception], message: str, updates_in_flight: bool
) -> None:
    """Faults: failure reported as success; publish to the wrong worker."""
    engine = Failing(reply=4, manual=True, updates_in_flight=updates_in_flight)
    with rolling(engine, batch_size=1, max_head_lag=1) as executor:
        engine.wait_for_requests(2)
        engine.how = how
        engine.events.clear()
        with pytest.raises(error, match=message):
            step(executor)
        assert executor.version == 0 and "resume" not in engine.events
        engine.advance(9, awaiting=2 if how == "other version" and updates_in_flight else 0)
        assert engine.num_generated == 0 and engine.events.count("generate") == 0


@pytest.mark.parametrize("version", [0, 1, 3, 4], ids=lambda v: f"publish {v}")
def test_only_the_next_version_can_be_published(version: int) -> None:
    engine = RecordingEngine()
    with rolling(engine, version=1, start=True) as executor:
        engine.events.clear()
        with pytest.raises(VersionError, match=f"at version 1; cannot commit {version}"):
            executor.publish([], version)
        assert "pause" not in engine.events, "nothing was touched"
        with pytest.raises(VersionError, match="cannot commit 5"):
            executor.registry.commit(5)
        step(executor)


@pytest.mark.parametrize("held", [None, 0, 41], ids=lambda v: f"the engine holds {v}")
def test_a_start_takes_any_version_and_both_agree_after_it(held: int | None) -> None:
    engine = FakeEngine()
    if held is not None:
        engine.update_weights([], held, reset=True)
    engine.pause()
    with rolling(engine, version=7) as executor:
        assert (engine.version, executor.version) == (7, 7)
        assert executor.stat.consumed == 7 * 2
        assert [versions(t) for g in executor.take() or [] for t in g.trajectories] == [[7], [7]]
