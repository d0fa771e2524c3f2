"""How a task runner ends: closed, dead, or by one of its own tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from sdp_lightning.errors import RolloutError, RolloutTimeout
from sdp_lightning.rollout.task_runner import TaskResult
from support.rollouts import DEADLINE_S
from support.task_runners import Make, for_ever, give, runners_under_test


@pytest.fixture
def make() -> Iterator[Make]:
    with runners_under_test() as make_runner:
        yield make_runner


@pytest.mark.fault("thread died", "queue")
def test_a_dead_thread_wakes_every_waiter_with_its_error(make: Make) -> None:
    runner, waiting, errors = make(), threading.Barrier(4), []
    release = threading.Event()

    async def die() -> None:
        await asyncio.to_thread(release.wait, DEADLINE_S)
        raise SystemExit("the thread is gone")

    runner.submit(for_ever)
    runner.submit(die)

    def wait() -> None:
        waiting.wait()
        try:
            runner.wait(1, DEADLINE_S)
        except RolloutError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    waiting.wait()
    release.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(errors) == 3 and all("the thread is gone" in error for error in errors)
    with pytest.raises(RolloutError, match="died"):
        runner.submit(give, 1)


class Panic(BaseException):
    """As extensions in Rust raise."""


@pytest.mark.fault("exception", "queue")
@pytest.mark.parametrize("error", [Panic("p"), GeneratorExit(), asyncio.CancelledError()], ids=repr)
def test_whatever_ends_a_task_is_the_error_of_its_waiter(make: Make, error: BaseException) -> None:
    """Fault: what is no Exception, and a cancellation nobody asked for, are no result at all."""
    runner = make()

    async def end() -> None:
        raise error

    runner.submit(end)
    with pytest.raises(RolloutError, match=type(error).__name__) as caught:
        runner.wait(1, DEADLINE_S)
    cause = caught.value.__cause__
    assert cause is not None and type(cause.__cause__) is type(error)


@pytest.mark.fault("exception", "queue")
@pytest.mark.parametrize("error", [KeyError("no place"), Panic("no place")], ids=repr)
def test_an_error_in_on_result_ends_the_runner_and_its_tasks(
    make: Make, error: BaseException
) -> None:
    """Fault: failure reported as success."""
    cancelled = threading.Event()

    def refuse(result: TaskResult) -> None:
        raise error

    async def long() -> None:
        try:
            await for_ever()
        finally:
            cancelled.set()

    runner = make(on_result=refuse)
    runner.submit(long)
    runner.submit(give, 1)
    with pytest.raises(RolloutError, match="no place"):
        runner.wait(1, DEADLINE_S)
    assert cancelled.wait(DEADLINE_S)


@pytest.mark.fault("hang", "teardown")
def test_closing_cancels_what_is_left_and_wakes_waiters(make: Make) -> None:
    runner, ended, waiting = make(max_running=1), threading.Event(), threading.Event()

    async def long() -> None:
        try:
            waiting.set()
            await for_ever()
        finally:
            ended.set()

    runner.submit(long)
    runner.submit(give, "never starts")
    assert waiting.wait(DEADLINE_S)
    errors: list[str] = []

    def wait() -> None:
        try:
            runner.wait(1)
        except RolloutError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    runner.close(DEADLINE_S)
    thread.join(DEADLINE_S)
    assert ended.is_set() and errors == ["runner 'runner-under-test' is closed."]
    runner.close()
    with pytest.raises(RolloutError, match="is closed"):
        runner.submit(give, 1)


def test_a_task_may_close_its_own_runner(make: Make) -> None:
    runner = make()

    async def close() -> None:
        runner.close()
        await for_ever()

    runner.submit(close)
    with pytest.raises(RolloutError, match="is closed"):
        runner.wait(1, DEADLINE_S)


@pytest.mark.fault("hang", "teardown")
def test_a_task_that_blocks_the_loop_makes_close_say_so(make: Make) -> None:
    runner, release, blocking = make(), threading.Event(), threading.Event()

    async def block() -> None:
        blocking.set()
        release.wait(DEADLINE_S)

    runner.submit(block)
    assert blocking.wait(DEADLINE_S)
    with pytest.raises(RolloutTimeout, match="a task blocks its event loop"):
        runner.close(timeout=0)
    release.set()


def test_no_thread_starts_before_the_first_task(make: Make) -> None:
    runner = make()
    assert runner.num_outstanding == 0
    assert not [t for t in threading.enumerate() if t.name == "runner-under-test"]
    runner.resume()
    runner.cancel(0)
    runner.close()
