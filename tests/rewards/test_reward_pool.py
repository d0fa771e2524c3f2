"""Rewards that hang, crash or eat memory: each costs one sample, never a worker for good."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool, RewardRejected
from support import misbehaving_rewards

DEADLINE_S = 60.0
FILE = misbehaving_rewards.__file__
PLACE = f"{FILE}:reward"
QUARTER_GIB = 2**28
ROW = {"id": "r7"}


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


def call(pool: RewardPool, completion: str, **row: Any) -> Any:
    return run(lambda: pool(completion, ROW | row))


def is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True).stdout
    return bool(state.strip()) and not state.startswith(b"Z")  # nobody may wait for an orphan


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


@pytest.fixture
def one() -> Iterator[RewardPool]:
    """A pool of one worker, with no deadline but a hang's."""
    with closing(RewardPool(PLACE, num_workers=1, timeout_s=DEADLINE_S)) as pool:
        yield pool


# What costs a process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["loop", "sleep_with_the_gil", "power_tower", "stop", "hang_with_a_child"]
)
@pytest.mark.fault("hang", "reward")
def test_a_call_that_hangs_is_killed_at_its_deadline_and_the_next_is_served(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: a hung reward (sympy) eats pool workers for good."""
    with closing(RewardPool(PLACE, num_workers=1, timeout_s=1.0)) as pool:
        killed = call(pool, "process_id")
        with caplog.at_level(logging.WARNING):
            assert call(pool, way, file=str(tmp_path / "child")) == 0.0
        assert not is_running(int(killed))
        assert f"'reward' took longer than 1.0 s on row 'r7', completion '{way}'" in caplog.text
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
    with closing(RewardPool(PLACE, timeout_s=DEADLINE_S, **settings)) as pool:
        killed = call(pool, "process_id")
        with caplog.at_level(logging.WARNING):
            assert call(pool, way) == 0.0
        assert f"ran out of memory (memory_bytes={QUARTER_GIB}) on row 'r7'" in caplog.text
        assert call(pool, "process_id") != killed
        assert pool.counts == RewardCounts(value=2, out_of_memory=1)


def test_ten_gigabytes_are_too_many_by_default(one: RewardPool) -> None:
    assert call(one, "one_big_piece") == 0.0
    assert one.counts.out_of_memory == 1


@pytest.mark.fault("process killed", "reward")
def test_after_every_worker_was_lost_the_pool_has_its_full_size_again(tmp_path: Path) -> None:
    """Three calls that end only when all three are in: in three processes at once."""
    with closing(RewardPool(PLACE, num_workers=3, timeout_s=2 * DEADLINE_S)) as pool:

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
            values = [await pool("good", ROW) for _ in range(200)]
            assert not hung.done()
            hung.cancel()
            return values

        assert run(main) == [1.0] * 200


def test_losing_one_process_after_another_is_an_error_and_one_answer_starts_anew() -> None:
    """Fault: failure reported as success."""
    with closing(RewardPool(PLACE, num_workers=1, max_killed_in_a_row=3)) as pool:
        for way in ("leave", "abort", "good", "leave", "abort"):
            call(pool, way)
        with pytest.raises(RolloutError, match=r"3 worker processes in a row.*exit status 3"):
            call(pool, "leave")


# What does not ------------------------------------------------------------------------------------


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
    before = call(one, "process_id")
    with pytest.raises(RolloutError, match=message) as caught:
        call(one, way)
    assert "misbehaving_rewards.py" in caught.value.__notes__[0] or "returned" in message
    assert call(one, "process_id") == before
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
    before = call(one, "process_id")
    assert [call(one, way), call(one, way), call(one, "process_id")] == [1.0, 1.0, before]
    output, errors = capfd.readouterr()
    assert output == "" and "Traceback" not in errors


@pytest.mark.parametrize("way", ["fork_and_leave_a_loop", "thread"])
def test_what_a_reward_leaves_running_ends_with_the_pool(one: RewardPool, way: str) -> None:
    process = int(call(one, way))
    children = subprocess.run(["pgrep", "-g", str(process)], capture_output=True, text=True)
    group = [int(line) for line in children.stdout.split()]
    assert len(group) == (2 if way == "fork_and_leave_a_loop" else 1)
    one.close()
    wait_until(lambda: not any(is_running(number) for number in group))


@pytest.mark.fault("process killed", "reward")
def test_a_worker_that_dies_between_calls_costs_nothing(one: RewardPool) -> None:
    before = int(call(one, "process_id"))
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: not is_running(before))
    assert call(one, "process_id") != before
    assert one.counts == RewardCounts(value=2)


def test_workers_stay_light(one: RewardPool) -> None:
    """Neither torch nor numpy: or each would take seconds to start, and hundreds of MB."""
    assert call(one, "has_torch") == 0.0


def test_large_rows_and_many_calls_get_through(one: RewardPool) -> None:
    assert call(one, "big_row", text="x" * 10**7) == 10**7

    async def main() -> list[float]:
        return await asyncio.gather(*[one("good", ROW) for _ in range(500)])

    assert run(main) == [1.0] * 500


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


# Settings, loading --------------------------------------------------------------------------------


def closure() -> Any:
    return lambda completion, row: 0.0


def script_function(completion: str, row: Any) -> float:
    return 0.0


script_function.__module__ = "__main__"


@pytest.mark.parametrize(
    "reward",
    [closure(), script_function, [].append, misbehaving_rewards.__name__.join],
    ids=["a lambda", "of the script", "a method", "of a string"],
)
def test_a_reward_without_a_place_is_refused_with_the_remedy(reward: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot import .*reward='path/to/file.py:name'"):
        RewardPool(reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be an integer of at least 1, got 0"),
        ({"memory_bytes": 0.5}, "memory_bytes must be an integer of at least 1, got 0.5"),
        ({"max_killed_in_a_row": 0}, "max_killed_in_a_row must be"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"start_s": -1}, "start_s must be positive"),
        ({"on_kill": "ignore"}, "on_kill must be zero, reject or raise; got 'ignore'"),
        ({"on_error": None}, "on_error must be"),
    ],
    ids=str,
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardPool(PLACE, **settings)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ImportError('no wheel')", r"raised ImportError: no wheel while .* loaded it"),
        ("os._exit(5)", "ended its process with exit status 5 while"),
        ("time.sleep(3600)", "took longer than 1.0 s while"),
    ],
    ids=["raises", "exits", "hangs"],
)
def test_a_reward_that_only_the_workers_cannot_load_is_an_error_and_not_a_zero(
    tmp_path: Path, body: str, message: str
) -> None:
    file = tmp_path / "picky.py"
    text = f"import os, sys, time\nif 'pytest' not in sys.modules:\n    {body}\n"
    file.write_text(text + "def reward(completion, row):\n    return 1.0\n")
    with closing(RewardPool(f"{file}:reward", num_workers=1, start_s=1.0)) as pool:
        for _ in range(2):
            with pytest.raises(RolloutError, match=message):
                call(pool, "any")
        assert pool.counts == RewardCounts()
        file.write_text(file.read_text().replace(body, "pass"))
        assert call(pool, "any") == 1.0


# Beginnings and ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_its_own_processes_also_when_the_original_has_started(
    one: RewardPool, duplicate: Any
) -> None:
    first = call(one, "process_id")
    with closing(duplicate(one)) as other:
        second = call(other, "process_id")
        assert other.counts == RewardCounts(value=1)
    assert second != first and call(one, "process_id") == first


def test_event_loops_share_a_pool(one: RewardPool) -> None:
    """``call`` makes a new one each time."""
    assert call(one, "process_id") == call(one, "process_id")


@pytest.mark.parametrize("way", ["hang_and_say_so", "hang_with_a_child_of_c"])
@pytest.mark.fault("hang", "teardown")
def test_close_ends_calls_and_processes_at_once_and_the_pool_may_be_used_again(
    tmp_path: Path, way: str
) -> None:
    file = tmp_path / "process"
    pool = RewardPool(PLACE, num_workers=1, timeout_s=2 * DEADLINE_S)

    async def main() -> None:
        calls = [asyncio.ensure_future(pool(way, {"file": str(file)}))]
        while not (file.exists() and file.read_text()):
            await asyncio.sleep(0.01)
        calls.append(asyncio.ensure_future(pool("good", ROW)))
        await asyncio.sleep(0)
        before = threading.active_count()
        pool.close()
        assert threading.active_count() < before, "the pool's thread goes on"
        for failed in calls:
            with pytest.raises(RolloutError, match="pool was closed"):
                await failed

    run(main)
    assert not is_running(int(file.read_text()))
    pool.close()
    assert call(pool, "good") == 1.0
    pool.close()
    assert pool.counts == RewardCounts(value=1)


def test_a_pool_that_is_dropped_leaves_no_process() -> None:
    pool = RewardPool(PLACE, num_workers=1)
    process = int(call(pool, "process_id"))
    del pool
    wait_until(lambda: not is_running(process))


def test_a_call_that_was_cancelled_before_its_turn_is_not_made(
    one: RewardPool, tmp_path: Path
) -> None:
    async def main() -> float:
        here = {"folder": str(tmp_path), "num": 2}
        first = asyncio.ensure_future(one("meet", here))
        second = asyncio.ensure_future(one("leave", ROW))
        await asyncio.sleep(0)
        second.cancel()
        (tmp_path / "other").touch()
        return await first + await one("good", ROW)

    assert run(main) == 2.0
    assert one.counts == RewardCounts(value=2)


# Whole programs -----------------------------------------------------------------------------------

BEGIN = f"""
import asyncio, os, sys
from sdp_lightning.rewards import RewardPool
print("begins", flush=True)
pool = RewardPool({PLACE!r}, num_workers=2)
def call(way, **row):
    return asyncio.run(pool(way, row))
async def many(*ways):
    row = {{"folder": sys.argv[1], "num": 2, "file": sys.argv[2]}}
    return await asyncio.gather(*[pool(way, row) for way in ways])
"""


@contextmanager
def program(body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Without ``if __name__ == "__main__"``: the workers do not run it."""
    (folder / "met").mkdir()
    text = BEGIN + textwrap.dedent(body)
    with subprocess.Popen(
        [sys.executable, "-c", text, str(folder / "met"), str(folder / "file")],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_program_that_ends_without_close_leaves_no_process(tmp_path: Path) -> None:
    with program("asyncio.run(many('meet', 'meet'))", tmp_path) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert output == "begins\n" and process.returncode == 0
    workers = [int(path.name) for path in (tmp_path / "met").iterdir()]
    assert len(workers) == 2 and not any(map(is_running, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a call in C goes on to its end")
@pytest.mark.fault("process killed", "teardown")
def test_no_process_survives_a_program_that_is_killed_not_even_amid_a_call(tmp_path: Path) -> None:
    body = "asyncio.run(many('meet', 'meet')); asyncio.run(many('hang_and_say_so'))"
    with program(body, tmp_path) as process:
        wait_until(lambda: (tmp_path / "file").exists() and bool((tmp_path / "file").read_text()))
        workers = [int(path.name) for path in (tmp_path / "met").iterdir()]
        assert len(workers) == 2 and all(map(is_running, workers))
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    wait_until(lambda: not any(map(is_running, workers)))


def test_a_worker_whose_parent_is_gone_already_ends_itself() -> None:
    """On Linux before it serves; elsewhere by a thread that watches the parent."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for body in (f"worker_main.main(0, {gone.pid})", f"worker_main._watch({gone.pid})"):
        text = f"from sdp_lightning.rewards import worker_main\n{body}"
        started = subprocess.Popen([sys.executable, "-c", text], process_group=0)
        assert started.wait(DEADLINE_S) in (1, -signal.SIGKILL)


def test_a_forked_process_starts_its_own_workers_and_leaves_the_others_alone(
    tmp_path: Path,
) -> None:
    body = """
    import warnings
    warnings.simplefilter("ignore")  # of forks beside threads: what this is about
    first = call("process_id")
    if (child := os.fork()) == 0:
        second = call("process_id")
        print("own" if second != first else "shared", flush=True)
        sys.exit(0)  # with what atexit does
    print(os.waitpid(child, 0)[1], flush=True)
    print("same" if first in asyncio.run(many("process_id", "process_id")) else "lost")
    """
    with program(body, tmp_path) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert output.split() == ["begins", "own", "0", "same"]
