"""Rewards that hang, crash or eat memory: each costs one sample, never a worker for good."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import InfrastructureError, RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool, RewardRejected
from support import misbehaving_rewards
from support.reward_pools import (
    DEADLINE_S,
    FILE,
    PLACE,
    QUARTER_GIB,
    ROW,
    call,
    group_of,
    is_running,
    run,
)
from support.waiting import wait_for


@pytest.fixture
def one() -> Iterator[RewardPool]:
    """A pool of one worker, with no deadline but a hang's."""
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, timeout_s=DEADLINE_S)) as pool:
        yield pool


@pytest.mark.parametrize(
    "way", ["loop", "sleep_with_the_gil", "power_tower", "stop", "hang_with_a_child"]
)
@pytest.mark.fault("hang", "reward")
def test_a_call_that_hangs_is_killed_at_its_deadline_and_the_next_is_served(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: a hung reward (sympy) eats pool workers for good."""
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, timeout_s=5.0)) as pool:
        killed = call(pool, "process_id")
        with caplog.at_level(logging.WARNING):
            assert call(pool, way, file=str(tmp_path / "child")) == 0.0
        assert not is_running(int(killed))
        assert f"'reward' took longer than 5.0 s on row 'r7', completion '{way}'" in caplog.text
        assert call(pool, "process_id") not in (0.0, killed)
        assert pool.counts == RewardCounts(value=2, timed_out=1)
    if way == "hang_with_a_child":
        assert not is_running(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("abort", "died of SIGABRT"),
        ("read_null", "died of SIGSEGV"),
        ("leave", "ended its process with exit status 3"),
        ("leave_with_a_child_behind", "ended its process with exit status 3"),
        ("close_all_files", "closed the connection of its process"),
        ("write_into_all_files", "wrote into the connection of its process"),
    ],
)
@pytest.mark.fault("process killed", "reward", only="^(abort|read_null|leave)")
@pytest.mark.fault("corrupted data", "reward", only="write_into_all_files")
def test_a_call_that_ends_its_process_is_named_at_once_and_the_next_is_served(
    one: RewardPool, way: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed = call(one, "process_id")
    with caplog.at_level(logging.WARNING):
        assert call(one, way) == 0.0
    assert f"reward 'reward' {what} on row 'r7'" in caplog.text
    assert call(one, "process_id") != killed and not is_running(int(killed))
    assert one.counts == RewardCounts(value=2, crashed=1)


@pytest.mark.parametrize("way", ["one_big_piece", "many_small_pieces"])
@pytest.mark.fault("process killed", "reward")
def test_a_call_that_eats_memory_is_stopped_at_its_bound(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"num_workers": 1, "memory_bytes": QUARTER_GIB}
    with closing(RewardPool(PLACE, on_kill="zero", timeout_s=DEADLINE_S, **settings)) as pool:
        killed = call(pool, "process_id")
        with caplog.at_level(logging.WARNING):
            assert call(pool, way) == 0.0
        assert "ran out of memory (limits.memory_mb=256.0) on row 'r7'" in caplog.text
        assert call(pool, "process_id") != killed
        assert pool.counts == RewardCounts(value=2, out_of_memory=1)


def test_ten_gigabytes_are_too_many_by_default(one: RewardPool) -> None:
    assert call(one, "one_big_piece") == 0.0
    assert one.counts.out_of_memory == 1


@pytest.mark.fault("process killed", "reward")
def test_after_every_worker_was_lost_the_pool_has_its_full_size_again(tmp_path: Path) -> None:
    """Three calls that end only when all three are in: in three processes at once."""
    with closing(
        RewardPool(PLACE, on_kill="zero", num_workers=3, timeout_s=2 * DEADLINE_S)
    ) as pool:

        async def main() -> tuple[list[float], list[float]]:
            lost = await asyncio.gather(*[pool("leave", ROW) for _ in range(6)])
            here = {"folder": str(tmp_path), "num": 3}
            return lost, await asyncio.gather(*[pool("meet", here) for _ in range(3)])

        assert run(main) == ([0.0] * 6, [1.0] * 3)
        assert pool.counts == RewardCounts(value=3, crashed=6)
        assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.fault("hang", "reward")
def test_the_others_go_on_while_one_hangs() -> None:
    with closing(RewardPool(PLACE, num_workers=2, timeout_s=2 * DEADLINE_S)) as pool:

        async def main() -> list[float]:
            hung = asyncio.ensure_future(pool("loop", ROW))
            values = [await pool("good", ROW) for _ in range(50)]
            assert not hung.done()
            hung.cancel()
            return values

        assert run(main) == [1.0] * 50


def test_losing_one_process_after_another_is_an_error_and_one_answer_starts_anew() -> None:
    """Fault: failure reported as success."""
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, max_killed_in_a_row=3)) as pool:
        for way in ("leave", "abort", "good", "leave", "abort"):
            call(pool, way)
        with pytest.raises(RolloutError, match=r"3 worker processes in a row.*exit status 3"):
            call(pool, "leave")


@pytest.mark.parametrize(
    ("way", "cause"),
    [("leave", "a reward crashed"), ("one_big_piece", "a reward ran out of memory")],
)
def test_a_lost_call_is_an_infrastructure_error_unless_a_bad_answer_may_be_its_cause(
    way: str, cause: str
) -> None:
    settings: dict[str, Any] = {"num_workers": 1, "memory_bytes": QUARTER_GIB}
    with closing(RewardPool(PLACE, timeout_s=DEADLINE_S, **settings)) as pool:
        with pytest.raises(InfrastructureError) as caught:
            call(pool, way)
        assert caught.value.cause == cause and call(pool, "good") == 1.0
    assert RewardPool(f"{FILE}:evaluating", num_workers=1).on_kill == "zero"


def test_an_infrastructure_error_in_a_worker_is_one_here_and_costs_no_process(
    one: RewardPool,
) -> None:
    before = call(one, "parent_id")
    with pytest.raises(InfrastructureError, match=r"^the judge timed out$"):
        call(one, "ask a judge")
    assert call(one, "parent_id") == before
    assert one.counts == RewardCounts(value=2, infrastructure=1)


def test_a_verifier_that_raises_on_answers_is_named_once_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with closing(RewardPool(f"{FILE}:evaluating", num_workers=1)) as pool:
        assert [call(pool, text) for text in ("two", "3", "four", "")] == [0.0, 1.0, 0.0, 0.0]
        assert pool.counts == RewardCounts(value=4, verifier_raised=3)
    expected = "int() raised ValueError on row 'r7', completion 'two'; such an answer is wrong"
    assert [m for m in caplog.messages if "raised" in m] == [
        f"{expected}: 0. Further ones are only counted, as verifier_raised"
    ]


# What costs no process ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("divide", r"'reward' raised ZeroDivisionError: division by zero"),
        ("sys.exit", r"raised SystemExit: 3"),
        ("interrupt", r"raised KeyboardInterrupt: by itself"),
        ("unpicklable", r"returned <function unpicklable.*it must be a number"),
        ("unspeakable", r"returned x{500}; it must be a number"),
        ("no such way", r"raised KeyError: 'no such way'"),
    ],
)
@pytest.mark.fault("exception", "reward")
def test_an_error_of_the_reward_is_raised_with_its_traceback_and_costs_no_process(
    one: RewardPool, way: str, message: str
) -> None:
    before = call(one, "parent_id")
    with pytest.raises(RolloutError, match=message) as caught:
        call(one, way)
    assert "misbehaving_rewards.py" in caught.value.__notes__[0] or "returned" in message
    assert call(one, "parent_id") == before
    assert one.counts == RewardCounts(value=2, raised=1)


def test_an_error_of_the_reward_may_count_as_zero(caplog: pytest.LogCaptureFixture) -> None:
    with closing(RewardPool(PLACE, num_workers=1, on_error="zero")) as pool:
        assert call(pool, "divide") == 0.0
        assert "raised ZeroDivisionError: division by zero on row 'r7'" in caplog.text
        assert pool.counts == RewardCounts(raised=1)


@pytest.mark.parametrize(("policy", "error"), [("raise", RolloutError), ("reject", RewardRejected)])
def test_a_killed_call_may_raise_or_reject_instead(policy: Any, error: type[Exception]) -> None:
    with closing(RewardPool(PLACE, num_workers=1, on_kill=policy)) as pool:
        with pytest.raises(RolloutError, match="exit status 3") as caught:
            call(pool, "leave")
        assert type(caught.value) is error and call(pool, "good") == 1.0


@pytest.mark.parametrize("way", ["noise", "alarm", "fork_and_both_return"])
def test_noise_signals_and_forks_do_no_harm(
    one: RewardPool, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = call(one, "parent_id")
    assert [call(one, way), call(one, way), call(one, "parent_id")] == [1.0, 1.0, before]
    output, errors = capfd.readouterr()
    assert output == "" and "Traceback" not in errors


@pytest.mark.parametrize("way", ["fork_and_leave_a_loop", "thread"])
def test_what_a_reward_leaves_running_ends_with_its_call_or_the_pool(way: str) -> None:
    for forks in (True, False):
        with closing(RewardPool(PLACE, num_workers=1, fork_calls=forks)) as pool:
            process = int(call(pool, way))
            group = group_of(process)
            assert len(group) == (0 if forks else 2 if way == "fork_and_leave_a_loop" else 1)
            assert call(pool, "good") == 1.0
        wait_for(lambda: not group_of(process))  # noqa: B023 # called in this turn


@pytest.mark.fault("process killed", "reward")
def test_a_worker_that_dies_between_calls_costs_nothing(one: RewardPool) -> None:
    before = int(call(one, "parent_id"))
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: not is_running(before))
    assert call(one, "parent_id") != before
    assert one.counts == RewardCounts(value=2)


def test_workers_stay_light(one: RewardPool) -> None:
    """Neither torch nor numpy: or each would take seconds to start, and hundreds of MB."""
    assert call(one, "has_torch") == 0.0


def test_large_rows_and_many_calls_get_through(one: RewardPool) -> None:
    assert call(one, "big_row", text="x" * 10**7) == 10**7

    async def main() -> list[float]:
        return await asyncio.gather(*[one("good", ROW) for _ in range(100)])

    assert run(main) == [1.0] * 100


def test_async_rewards_and_functions_will_do() -> None:
    for reward in (misbehaving_rewards.async_reward, f"{FILE}:async_reward"):
        with closing(RewardPool(reward, num_workers=1)) as pool:
            assert call(pool, "four") == 4.0
    with closing(RewardPool(load_object(f"{FILE}:async_reward"), num_workers=1)) as pool:  # type: ignore[arg-type]
        assert call(pool, "four") == 4.0


@pytest.mark.fault("corrupted data", "reward")
def test_a_row_that_cannot_be_sent_is_named(one: RewardPool) -> None:
    with pytest.raises(RolloutError, match=r"row 'r7' cannot be sent to a worker process"):
        call(one, "good", value=lambda: 0)
