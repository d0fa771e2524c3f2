"""How the processes of a reward pool begin and end: copies, forks, close, a killed program."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool
from support.reward_pools import DEADLINE_S, PLACE, ROW, call, is_running, run
from support.waiting import wait_for


@pytest.fixture
def one() -> Iterator[RewardPool]:
    """A pool of one worker, with no deadline but a hang's."""
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, timeout_s=DEADLINE_S)) as pool:
        yield pool


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_its_own_processes_also_when_the_original_has_started(
    one: RewardPool, duplicate: Any
) -> None:
    first = call(one, "parent_id")
    with closing(duplicate(one)) as other:
        second = call(other, "parent_id")
        assert other.counts == RewardCounts(value=1)
    assert second != first and call(one, "parent_id") == first


def test_event_loops_share_a_pool(one: RewardPool) -> None:
    """``call`` makes a new one each time."""
    assert call(one, "parent_id") == call(one, "parent_id")


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
    for child in tmp_path.glob("*.child"):
        assert not is_running(int(child.read_text()))
    pool.close()
    assert call(pool, "good") == 1.0
    pool.close()
    assert pool.counts == RewardCounts(value=1)


def test_a_pool_that_is_dropped_leaves_no_process() -> None:
    pool = RewardPool(PLACE, num_workers=1)
    process = int(call(pool, "parent_id"))
    del pool
    wait_for(lambda: not is_running(process))


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
        wait_for(lambda: (tmp_path / "file").exists() and bool((tmp_path / "file").read_text()))
        workers = [int(path.name) for path in (tmp_path / "met").iterdir()]
        assert len(workers) == 2 and all(map(is_running, workers))
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    wait_for(lambda: not any(map(is_running, workers)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a subreaper")
@pytest.mark.fault("process killed", "teardown")
def test_sessions_that_a_reward_started_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    body = "asyncio.run(many('daemon_and_hang'))"
    with program(body, tmp_path) as process:
        wait_for(lambda: (tmp_path / "file").exists() and bool((tmp_path / "file").read_text()))
        children = [int(path.name) for path in (tmp_path / "met").iterdir()]
        assert len(children) == 2 and all(map(is_running, children))
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    wait_for(lambda: not any(map(is_running, children)))


def test_a_worker_whose_parent_is_gone_already_ends_itself() -> None:
    """On Linux before it serves; elsewhere when it waits for a call."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    start = f"worker_main.main(socket.socketpair()[1].detach(), {gone.pid})"
    unprepared = "worker_main._prepare_linux = lambda parent: []"
    for lines in ([start], [unprepared, start]):
        body = "\n".join(["import socket", "from sdp_lightning.rewards import worker_main", *lines])
        started = subprocess.Popen([sys.executable, "-c", body], process_group=0)
        assert started.wait(DEADLINE_S) in (0, 1)


def test_a_forked_process_starts_its_own_workers_and_leaves_the_others_alone(
    tmp_path: Path,
) -> None:
    body = """
    import warnings
    warnings.simplefilter("ignore")  # of forks beside threads: what this is about
    first = call("parent_id")
    if (child := os.fork()) == 0:
        second = call("parent_id")
        print("own" if second != first else "shared", flush=True)
        sys.exit(0)  # with what atexit does
    print(os.waitpid(child, 0)[1], flush=True)
    print("same" if first in asyncio.run(many("parent_id", "parent_id")) else "lost")
    """
    with program(body, tmp_path) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert output.split() == ["begins", "own", "0", "same"]
