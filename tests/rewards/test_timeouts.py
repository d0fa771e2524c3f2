"""A reward may block, hang, fail or be async: it stalls and hides nothing."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.timeouts import call_reward

DEADLINE_S = 60.0


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


class AsyncCallable:
    async def __call__(self, text: str) -> float:
        await asyncio.sleep(0)
        return len(text)


async def async_length(text: str) -> int:
    return len(text)


@pytest.mark.parametrize(
    "reward",
    [len, lambda text: float(len(text)), async_length, AsyncCallable(), lambda t: async_length(t)],
    ids=["builtin", "plain", "async", "object with async call", "returns an awaitable"],
)
def test_any_kind_of_function_will_do(reward: Any) -> None:
    value = run(lambda: call_reward(reward, "four", timeout_s=DEADLINE_S))
    assert value == 4.0 and isinstance(value, float)


@pytest.mark.fault("slow", "reward")
def test_rewards_that_block_run_side_by_side_and_stall_nothing() -> None:
    """Eight that return only when all eight have begun: one pool of fewer threads would hang."""
    meeting = threading.Barrier(8)

    async def main() -> list[float]:
        calls = [call_reward(meeting.wait, DEADLINE_S, timeout_s=DEADLINE_S) for _ in range(8)]
        return await asyncio.gather(*calls)

    assert sorted(run(main)) == list(range(8))


@pytest.mark.fault("hang", "reward")
def test_a_hung_reward_fails_at_its_deadline_and_takes_no_worker_from_others() -> None:
    """Fault: a hung reward eats pool workers for good."""
    release = threading.Event()

    async def main() -> float:
        for _ in range(40):
            with pytest.raises(RolloutError, match=r"'wait' took longer than 0.001 s"):
                await call_reward(release.wait, DEADLINE_S, timeout_s=0.001)
        return await call_reward(len, "ok", timeout_s=DEADLINE_S)

    try:
        assert run(main) == 2.0
    finally:
        release.set()


@pytest.mark.fault("hang", "reward")
def test_a_late_result_is_ignored_also_when_the_loop_is_gone() -> None:
    release, ended = threading.Event(), threading.Event()

    def late() -> float:
        release.wait(DEADLINE_S)
        threading.current_thread().name = "sdp-late-reward"
        ended.set()
        return 1.0

    async def main() -> None:
        with pytest.raises(RolloutError, match="took longer"):
            await call_reward(late, timeout_s=0.001)

    run(main)
    release.set()
    assert ended.wait(DEADLINE_S)
    for thread in threading.enumerate():
        if thread.name == "sdp-late-reward":
            thread.join(DEADLINE_S)  # an exception in it would fail this test


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None; it must be a number"),
        ("text", "returned 'text'; it must be a number"),
        (10**400, "must be a number"),
        (float("nan"), "returned nan; it must be finite"),
        (float("-inf"), "returned -inf; it must be finite"),
    ],
    ids=["nothing", "text", "too large", "nan", "infinite"],
)
@pytest.mark.fault("corrupted data", "reward")
def test_no_finite_number_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        run(lambda: call_reward(lambda: value, timeout_s=DEADLINE_S))


@pytest.mark.fault("exception", "reward")
def test_an_error_of_the_reward_goes_on_as_it_is() -> None:
    def fail() -> float:
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        run(lambda: call_reward(fail, timeout_s=DEADLINE_S))


@pytest.mark.parametrize(
    "error", [TimeoutError("its own"), asyncio.CancelledError("its own"), StopIteration("its own")]
)
@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.fault("exception", "reward")
def test_an_error_that_means_something_else_to_a_caller_names_the_reward(
    error: BaseException, kind: str
) -> None:
    """A deadline of its own is not that of the run, nor a client that was closed its end."""

    def judge() -> float:
        raise error

    async def async_judge() -> float:
        return judge()

    reward = judge if kind == "plain" else async_judge
    if (kind, type(error)) == ("async", StopIteration):  # Python turns it into its own kind
        expected, pattern = RuntimeError, "coroutine raised StopIteration"
    else:
        expected, pattern = RolloutError, rf"reward '{reward.__name__}' raised .*its own"
    with pytest.raises(expected, match=pattern) as found:
        run(lambda: call_reward(reward, timeout_s=DEADLINE_S))
    if isinstance(error, TimeoutError):
        assert "not the 60.0 s that it is given (reward_timeout_s)" in str(found.value)


@pytest.mark.fault("hang", "reward")
def test_an_async_reward_that_hangs_is_cancelled() -> None:
    ended: list[str] = []

    async def hang() -> float:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")
        return 0.0

    with pytest.raises(RolloutError, match=r"'hang' took longer than 0\.01 s"):
        run(lambda: call_reward(hang, timeout_s=0.01))
    assert ended == ["cancelled"]


@pytest.mark.fault("thread died", "reward")
def test_a_reward_that_ends_its_thread_fails_at_once_and_says_so() -> None:
    with pytest.raises(RolloutError, match=r"called sys\.exit\(3\)"):
        run(lambda: call_reward(sys.exit, 3, timeout_s=2 * DEADLINE_S))
