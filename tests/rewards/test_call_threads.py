"""Threads of plain rewards and environments: bounded, and never lost without a word."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards import timeouts
from sdp_lightning.rewards.call_threads import CallLoad, CallThreads
from sdp_lightning.rewards.timeouts import call_reward
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.environment import BoundedEnvironment, Environment
from support.rollouts import rolling
from support.waiting import wait_for

DEADLINE_S = 60.0


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[CallThreads]:
    """Four threads, and three that may be lost."""
    four = CallThreads(num_threads=4, max_lost=3)
    monkeypatch.setattr(timeouts, "THREADS", four)
    yield four
    wait_for(lambda: four.load == CallLoad())


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


def test_many_calls_take_turns_on_few_threads(threads: CallThreads) -> None:
    """Fault: a thread for each call, 3,938 of them for 800 groups."""
    most, inside, lock = 0, 0, threading.Lock()

    def reward(number: int) -> float:
        nonlocal most, inside
        with lock:
            inside += 1
            most = max(most, inside)
            assert threads.load.running <= 4
        with lock:
            inside -= 1
        return float(number)

    async def main() -> list[float]:
        calls = [call_reward(reward, n, timeout_s=DEADLINE_S) for n in range(400)]
        return await asyncio.gather(*calls)

    assert run(main) == list(range(400))
    assert 1 <= most <= 4


def test_the_rewards_of_many_groups_take_turns_on_few_threads(threads: CallThreads) -> None:
    """Through an executor: 400 completions end at once, and the calls that wait are counted."""
    release = threading.Event()

    def reward(completion: str, row: Any) -> float:
        assert release.wait(DEADLINE_S)
        return 1.0

    sampling = SamplingParams(max_new_tokens=4)
    workflow = sdp.RLVRWorkflow(reward, group_size=8, sampling=sampling)
    rows = [{"prompt": "1+1="}] * 50
    engine = FakeEngine(4, manual=True)
    settings: dict[str, Any] = {"batch_size": 50, "max_head_lag": 0, "num_epochs": 1}
    with rolling(engine, workflow, rows=rows, **settings) as executor:
        engine.advance(4, awaiting=400, timeout_s=DEADLINE_S)
        wait_for(lambda: threads.load == CallLoad(running=4, waiting=396))
        release.set()
        assert len(executor.take() or []) == 50


def test_calls_of_two_event_loops_take_turns_on_the_same_threads(threads: CallThreads) -> None:
    results: list[list[float]] = []

    async def main() -> list[float]:
        return await asyncio.gather(
            *[call_reward(float, n, timeout_s=DEADLINE_S) for n in range(50)]
        )

    others = [threading.Thread(target=lambda: results.append(run(main))) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(DEADLINE_S)
    assert results == [list(range(50))] * 2


@pytest.mark.fault("slow", "reward")
def test_the_wait_for_a_thread_is_not_counted_and_a_call_given_up_in_it_is_not_made(
    threads: CallThreads,
) -> None:
    release, made = threading.Event(), threading.Event()

    async def main() -> None:
        first = [
            asyncio.ensure_future(call_reward(release.wait, timeout_s=DEADLINE_S)) for _ in range(4)
        ]
        await asyncio.sleep(0)
        waits = asyncio.ensure_future(call_reward(threading.Event().wait, 0.5, timeout_s=0.001))
        dropped = asyncio.ensure_future(call_reward(made.set, timeout_s=DEADLINE_S))
        done, _ = await asyncio.wait({waits, dropped}, timeout=0.05)
        assert not done and threads.load == CallLoad(running=4, waiting=2)
        dropped.cancel()
        await asyncio.wait({dropped})
        assert threads.load == CallLoad(running=4, waiting=1)
        release.set()
        assert await asyncio.gather(*first) == [1.0] * 4
        with pytest.raises(RolloutError, match=r"took longer than 0.001 s"):
            await waits

    run(main)
    assert not made.is_set()


@pytest.mark.fault("hang", "reward")
def test_lost_threads_take_no_place_and_too_many_are_an_error(threads: CallThreads) -> None:
    release = threading.Event()

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(RolloutError, match="took longer"):
                await call_reward(release.wait, timeout_s=0.001)
        assert threads.load == CallLoad(lost=3)
        with pytest.raises(RolloutError, match=r"3 calls .* have not returned.*reward_workers"):
            await call_reward(len, "any", timeout_s=DEADLINE_S)
        release.set()
        while threads.load.lost:
            await asyncio.sleep(0.005)
        assert await call_reward(len, "four", timeout_s=DEADLINE_S) == 4.0

    try:
        run(main)
    finally:
        release.set()


def test_a_lost_thread_makes_room_for_the_next_call(threads: CallThreads) -> None:
    release = threading.Event()

    async def main() -> float:
        calls = [
            asyncio.ensure_future(call_reward(release.wait, timeout_s=DEADLINE_S)) for _ in range(4)
        ]
        await asyncio.sleep(0)
        fifth = asyncio.ensure_future(call_reward(len, "four", timeout_s=DEADLINE_S))
        await asyncio.sleep(0)
        calls[0].cancel()
        value = await fifth
        release.set()
        await asyncio.gather(*calls, return_exceptions=True)
        return value

    assert run(main) == 4.0


def test_a_thread_that_cannot_start_is_an_error_of_its_call(
    threads: CallThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run(lambda: call_reward(len, "any", timeout_s=DEADLINE_S))
    assert run(lambda: call_reward(len, "four", timeout_s=DEADLINE_S)) == 4.0


# What is no Exception -----------------------------------------------------------------------------


class Odd(BaseException):
    """Of a library."""


ENDS = {
    "called sys.exit(3)": SystemExit(3),
    "called sys.exit(None)": SystemExit(),
    "raised KeyboardInterrupt('by itself')": KeyboardInterrupt("by itself"),
    "raised GeneratorExit()": GeneratorExit(),
    "raised CancelledError()": asyncio.CancelledError(),
    "raised Odd('x')": Odd("x"),
}


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("what", ENDS)
@pytest.mark.fault("thread died", "reward")
def test_whatever_a_reward_raises_its_caller_hears_of_it_by_name(
    threads: CallThreads, what: str
) -> None:
    with pytest.raises(RolloutError) as caught:
        run(lambda: call_reward(fail_with(ENDS[what]), timeout_s=DEADLINE_S))
    assert str(caught.value) == f"reward 'fail' {what}."
    assert caught.value.__cause__ is ENDS[what]


@pytest.mark.parametrize("what", [what for what in ENDS if "exit" in what or "Keyboard" in what])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "awaited"])
def test_an_async_reward_does_not_end_the_event_loop(what: str, late: bool) -> None:
    async def fail() -> float:
        if late:
            await asyncio.sleep(0)
        raise ENDS[what]

    for reward in (fail, lambda: fail()):

        async def main(reward: Any = reward) -> float:
            with pytest.raises(RolloutError) as caught:
                await call_reward(reward, timeout_s=DEADLINE_S)
            assert str(caught.value).endswith(f" {what}.")
            return await call_reward(len, "four", timeout_s=DEADLINE_S)

        assert run(main) == 4.0


class Failing(Environment):
    """Raises in both calls."""

    def __init__(self, error: BaseException) -> None:
        self.reset = self.step = fail_with(error)  # type: ignore[method-assign]

    def reset(self, row: Any) -> str:
        return ""

    def step(self, completion: str) -> tuple[str, float, bool]:
        return "", 0.0, True


@pytest.mark.parametrize("what", ENDS)
def test_whatever_an_environment_raises_its_caller_hears_of_it_by_name(
    threads: CallThreads, what: str
) -> None:
    environment = BoundedEnvironment(Failing(ENDS[what]), timeout_s=DEADLINE_S)
    for call, name in (
        (lambda: environment.reset({}), "reset()"),
        (lambda: environment.step("text"), "step() number 1"),
    ):
        with pytest.raises(RolloutError) as caught:
            run(call)
        assert str(caught.value) == f"Failing.{name} {what}."
