"""The clock of the trainer's phases, and what the other side's rollouts take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Row
from sdp_lightning.workflows.episode_log import EpisodeTimes
from support.rollouts import Samples, rolling, wait_until

PAUSE_S = 0.02


class Clock:
    """Time that only goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sdp_lightning.lightning.phase_timer.time", clock)
    return clock


def test_every_moment_is_in_one_phase(clock: Clock) -> None:
    phase_timer = PhaseTimer()
    for phase, seconds in (("wait", 2.0), ("train", 3.0), ("wait", 4.0), ("rest", 1.0)):
        phase_timer.enter(phase)
        clock.now += seconds
    assert phase_timer.now == ("rest", 1.0)
    assert phase_timer.take_spent() == {"rest": 1.0, "wait": 6.0, "train": 3.0}


def test_what_was_taken_is_not_taken_again_and_the_phase_goes_on(clock: Clock) -> None:
    phase_timer = PhaseTimer()
    phase_timer.enter("publish")
    clock.now += 2.0
    assert phase_timer.take_spent()["publish"] == 2.0
    clock.now += 0.5
    assert phase_timer.take_spent() == {"publish": 0.5}
    assert phase_timer.now[0] == "publish"


def test_times_of_trajectories_add_up() -> None:
    total = EpisodeTimes(1, 2.0, 3.0, 4.0) + EpisodeTimes(1, 0.5, 0.25, 0.125)
    assert total == EpisodeTimes(2, 2.5, 3.25, 4.125)


def slow_reward(completion: str, row: Mapping[str, Any]) -> float:
    time.sleep(PAUSE_S)
    return 1.0


def test_sampling_and_reward_of_a_trajectory_are_told_apart() -> None:
    workflow = sdp.RLVRWorkflow(
        slow_reward, group_size=2, sampling=sdp.SamplingParams(max_new_tokens=4), prompt_key="id"
    )
    engine = FakeEngine(latency_s=2 * PAUSE_S)
    with rolling(engine, workflow, rows=2, num_epochs=1) as executor:
        wait_until(executor, lambda: executor.stat.pending == 2)
        telemetry = executor.telemetry
        times = telemetry.times
        assert telemetry.timed_groups == 2 and times.num == 4
        assert times.sample_s >= 4 * 2 * PAUSE_S * 0.9  # sleeps may end a little early
        assert times.reward_s >= 4 * PAUSE_S * 0.9
        assert times.tool_s == 0.0
        assert telemetry.group_s >= 2 * 3 * PAUSE_S * 0.9
        assert executor.gate.busy_s >= 2 * PAUSE_S * 0.9


class TwoTurns(Samples):
    """Samples, works for a while, and samples again."""

    async def run(self, row: Row, session: Any) -> Any:
        episode = session.open()
        episode.add_context([1, 2])
        await episode.generate(self.sampling)
        time.sleep(PAUSE_S)
        episode.add_context([3])
        await episode.generate(self.sampling)
        return [episode.finish(1.0)]


def test_what_a_workflow_does_between_two_requests_is_tool_time() -> None:
    with rolling(FakeEngine(), TwoTurns(), rows=2, num_epochs=1) as executor:
        wait_until(executor, lambda: executor.stat.pending == 2)
        assert executor.telemetry.times.tool_s >= 2 * PAUSE_S * 0.9


def test_an_engine_with_no_request_is_not_busy() -> None:
    with rolling(FakeEngine(manual=True), rows=2, num_epochs=1) as executor:
        engine: Any = executor.engine
        engine.advance(4, awaiting=2)
        wait_until(executor, lambda: executor.stat.pending == 2)
        busy = executor.gate.busy_s
        time.sleep(PAUSE_S)
        assert executor.gate.busy_s == busy > 0


def test_the_slowest_groups_are_kept_with_what_became_of_them() -> None:
    """Six batches of two groups; those of version 0 that are left at version 2 are stale."""
    with rolling(FakeEngine(), batch_size=2, max_head_lag=1, rows=16, num_epochs=1) as executor:
        wait_until(executor, lambda: executor.stat.pending == 4)
        for version, num_begun in enumerate((6, 12, 14, 16, 16, 16), 1):
            if version > 2:
                assert executor.take()
                wait_until(executor, lambda: executor.stat.running == 0)  # or it may be overdue
            executor.publish([], version)
            wait_until(executor, lambda num=num_begun: executor.stat.submitted == num)
        slowest = executor.telemetry.slowest
    assert len(slowest) == 10 < executor.telemetry.trained_groups + 4
    assert [r.seconds for r in slowest] == sorted((r.seconds for r in slowest), reverse=True)
    assert {r.fate for r in slowest} == {"trained", "stale"}
    assert all(r.num_sampled == 4 for r in slowest)
