"""CONTRACT section 4: every task gives one result, whatever becomes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from sdp_lightning.errors import ConfigError, RolloutError, RolloutTimeout
from sdp_lightning.rollout.task_runner import TaskResult
from support.rollouts import DEADLINE_S
from support.task_runners import Make, Meeting, fail, for_ever, give, runners_under_test


@pytest.fixture
def make() -> Iterator[Make]:
    with runners_under_test() as make_runner:
        yield make_runner


def test_every_task_gives_one_result_of_any_type_and_surplus_stays(make: Make) -> None:
    runner = make()
    values = [None, 0, False, "", [], None, 7, "x", {}, None]
    for value in values:
        runner.submit(give, value)
    a, b, c = (runner.wait(n, DEADLINE_S) for n in (3, 4, 3))
    assert [len(a), len(b), len(c)] == [3, 4, 3]
    assert sorted(map(repr, [*a, *b, *c])) == sorted(map(repr, values))
    assert runner.wait(0) == [] and runner.num_outstanding == 0


def test_tasks_overlap(make: Make) -> None:
    """Five that end only when all five have started: one after another would never end."""
    runner, meeting = make(), Meeting(5)
    for _ in range(5):
        runner.submit(meeting.attend)
    assert runner.wait(5, DEADLINE_S) == [None] * 5


def test_at_most_max_running_tasks_run_at_once(make: Make) -> None:
    runner, here, most = make(max_running=2), 0, 0
    meetings = [Meeting(2) for _ in range(5)]  # a runner that ran fewer would never end

    async def work(number: int) -> None:
        nonlocal here, most
        here, most = here + 1, max(most, here + 1)
        await meetings[number // 2].attend()
        here -= 1

    for number in range(10):
        runner.submit(work, number)
    runner.wait(10, DEADLINE_S)
    assert most == 2


def test_paused_nothing_new_starts_and_running_tasks_go_on(make: Make) -> None:
    runner, go_on, started = make(), threading.Event(), threading.Event()

    async def running() -> str:
        started.set()
        await asyncio.to_thread(go_on.wait, DEADLINE_S)
        return "ran on"

    runner.submit(running)
    assert started.wait(DEADLINE_S)
    runner.pause()
    runner.submit(give, "new")
    go_on.set()
    assert runner.wait(1, DEADLINE_S) == ["ran on"]
    with pytest.raises(RolloutTimeout, match="0 are ready, 0 run, 1 wait to start"):
        runner.wait(1, timeout=0)
    runner.resume()
    assert runner.wait(1, DEADLINE_S) == ["new"]


def test_an_exception_reaches_the_waiter_with_its_cause_and_others_are_unaffected(
    make: Make,
) -> None:
    """Faults: a wait that hangs on failures; an exception leaks its slot."""
    runner = make(max_running=1)
    runner.submit(give, 1)
    failed = runner.submit(fail)
    runner.submit(give, 2)
    with pytest.raises(RolloutError, match=f"task {failed} failed .*boom") as caught:
        runner.wait(3, DEADLINE_S)
    assert isinstance(caught.value.__cause__, ValueError)
    assert runner.wait(2, DEADLINE_S) == [1, 2]


def test_max_failures_are_passed_over_and_counted(make: Make) -> None:
    runner = make(max_failures=2)
    for _ in range(2):
        runner.submit(fail)
    runner.submit(give, 1)
    assert runner.wait(1, DEADLINE_S) == [1]
    runner.submit(fail, "third")
    with pytest.raises(RolloutError, match=r"3 failed, 2 tolerated.*third"):
        runner.wait(1, DEADLINE_S)


def test_waiting_for_more_than_can_ever_come_is_an_error(make: Make) -> None:
    runner = make()
    runner.submit(give, 1)
    with pytest.raises(RolloutError, match="asked for 2 results, but"):
        runner.wait(2, DEADLINE_S)
    assert runner.wait(1, DEADLINE_S) == [1], "and loses nothing"


@pytest.mark.fault("hang", "queue")
def test_at_the_deadline_nothing_is_lost_and_zero_means_now(make: Make) -> None:
    """Fault: `x or default` where x may be 0: a timeout of 0 would wait for ever."""
    runner, release = make(), threading.Event()
    runner.submit(asyncio.to_thread, release.wait, DEADLINE_S)
    runner.submit(give, 1)
    with pytest.raises(RolloutTimeout, match="waited 0 s for 2 results"):
        runner.wait(2, timeout=0)
    release.set()
    assert len(runner.wait(2, DEADLINE_S)) == 2


@pytest.mark.parametrize("started", [True, False], ids=["running", "before its first step"])
def test_a_cancelled_task_yields_no_result_and_frees_its_place(make: Make, started: bool) -> None:
    """Fault: a task cancelled before its first step leaks its slot for good."""
    runner, began = make(max_running=1), threading.Event()

    async def work() -> None:
        began.set()
        await for_ever()

    async def submit_and_cancel() -> None:  # in the loop, so that the task cannot have begun
        runner.cancel(runner.submit(work))

    if started:
        task_id = runner.submit(work)
        assert began.wait(DEADLINE_S)
        runner.cancel(task_id)
    else:
        runner.submit(submit_and_cancel)
        assert runner.wait(1, DEADLINE_S) == [None]
    runner.submit(give, 1)
    assert runner.wait(1, DEADLINE_S) == [1] and runner.num_outstanding == 0
    runner.cancel(10**6)


def test_a_task_that_waits_can_be_cancelled(make: Make) -> None:
    runner = make()
    runner.pause()
    task_id = runner.submit(give, 1)
    runner.submit(give, 2)
    runner.cancel(task_id)
    runner.resume()
    assert runner.wait(1, DEADLINE_S) == [2] and runner.num_outstanding == 0


def test_cancelling_the_last_task_wakes_a_waiter(make: Make) -> None:
    runner = make()
    task_id = runner.submit(for_ever)
    threading.Timer(0, runner.cancel, (task_id,)).start()
    with pytest.raises(RolloutError, match="0 tasks are left"):
        runner.wait(1, DEADLINE_S)


def test_results_go_to_on_result_when_there_is_one(make: Make) -> None:
    got, both = [], threading.Event()

    def take(result: TaskResult) -> None:
        got.append(result)
        if len(got) == 2:
            both.set()

    runner = make(on_result=take)
    runner.submit(give, None)
    runner.submit(fail)
    assert both.wait(DEADLINE_S)
    assert {(r.task_id, r.value, type(r.error)) for r in got} == {
        *((0, None, type(None)), (1, None, ValueError))
    }


def test_pending_inputs_are_bounded(make: Make) -> None:
    """Fault: unbounded pending inputs."""
    runner = make(max_pending=2)
    runner.pause()
    runner.submit(give, 1)
    runner.submit(give, 2)
    with pytest.raises(RolloutError, match="2 tasks wait already"):
        runner.submit(give, 3)
    runner.resume()
    assert runner.wait(2, DEADLINE_S) == [1, 2]


@pytest.mark.parametrize("settings", [{"max_running": 0}, {"max_pending": 0}, {"max_failures": -1}])
def test_settings_out_of_range_are_refused(make: Make, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="AsyncTaskRunner needs"):
        make(**settings)
