"""Code that a reward runs cannot answer for it, nor outlive its worker."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.rewards import RewardCounts, RewardPool, WorkerLimits
from support.reward_pools import DEADLINE_S, PLACE, call, group_of, is_running, parent_of
from support.waiting import wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and a subreaper")
BODIES = {
    "a value": '{"value": 777}',
    "not a number": '{"value": NaN}',
    "infinite": '{"value": -Infinity}',
    "too large": '{"value": 1e999}',
    "a truth value": '{"value": true}',
    "text": '{"value": "777"}',
    "a list": "[777]",
    "deep": "[" * 100_000,
    "an error without a traceback": '{"error": "x"}',
    "no JSON": "\x00\ud7ff",
    "nothing": "",
    "the wrong type": '{"out_of_memory": 1}',
}


@pytest.fixture(scope="module")
def one() -> Iterator[RewardPool]:
    """A pool of one worker, with no deadline but a hang's, that forks a process for each call."""
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, timeout_s=DEADLINE_S)) as pool:
        yield pool


@pytest.fixture(scope="module")
def unforked() -> Iterator[RewardPool]:
    """The same, whose calls all run in the process that loaded the reward."""
    settings: dict[str, Any] = {"num_workers": 1, "timeout_s": DEADLINE_S}
    with closing(RewardPool(PLACE, on_kill="zero", fork_calls=False, **settings)) as pool:
        yield pool


def loses_only_its_own_sample(pool: RewardPool, way: str, **row: Any) -> None:
    before, worker = pool.counts, call(pool, "parent_id")
    assert call(pool, way, honest=5, **row) == 0.0
    assert [call(pool, "good"), call(pool, "bad")] == [1.0, 0.0]
    assert pool.counts == replace(before, value=before.value + 3, crashed=before.crashed + 1)
    lives_on = sys.platform == "linux" and pool.fork_calls
    assert (call(pool, "parent_id") == worker) == lives_on


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("tag", [b"", b"\0" * 15 + b"\2"], ids=["no tag", "the call's number"])
@pytest.mark.fault("corrupted data", "reward")
def test_a_forged_answer_costs_its_own_sample_and_no_other(
    one: RewardPool, body: str, tag: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    loses_only_its_own_sample(one, "forge", body=body, tag=tag)
    assert "wrote into the connection of its process" in caplog.text


@pytest.mark.parametrize("body", ["a value", "deep", "nothing"])
def test_without_forks_a_forged_answer_costs_its_worker(unforked: RewardPool, body: str) -> None:
    loses_only_its_own_sample(unforked, "forge", body=BODIES[body])


def test_an_answer_with_the_right_nonce_is_followed_by_the_honest_one_and_found(
    one: RewardPool, unforked: RewardPool
) -> None:
    for pool in (one, unforked):
        loses_only_its_own_sample(pool, "forge_with_the_nonce", body='{"value": 777.0}')


@pytest.mark.parametrize("body", [b for k, b in BODIES.items() if k != "a value"], ids=lambda _: "")
def test_code_that_takes_a_worker_over_still_answers_in_the_right_form(
    one: RewardPool, body: str
) -> None:
    loses_only_its_own_sample(one, "take_over", body=body)


def test_an_answer_without_an_end_is_refused_at_once(one: RewardPool) -> None:
    """Not read: 3 MB of it would be in memory."""
    loses_only_its_own_sample(one, "forge_with_the_nonce", body="x" * 3_000_000)


def test_bytes_between_calls_cost_the_worker_and_no_sample(
    unforked: RewardPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, process = unforked.counts, int(call(unforked, "process_id"))
    go, done = tmp_path / "go", tmp_path / "done"
    assert call(unforked, "forge_later", go=str(go), done=str(done)) == 1.0
    go.touch()
    wait_for(lambda: not is_running(process))
    with caplog.at_level(logging.WARNING):
        assert [call(unforked, "good"), call(unforked, "bad")] == [1.0, 0.0]
    assert "ended, or was written into, after its last answer" in caplog.text
    assert unforked.counts == replace(before, value=before.value + 4)


def test_a_worker_that_never_waits_for_a_call_is_not_replaced_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "restless.py"
    file.write_text(
        "import os, threading\n"
        "from sdp_lightning.rewards import worker_channel\n"
        "def reward(completion, row): return 1.0\n"
        "send = worker_channel.send\n"
        "def leave(connection, tag, data, wait=None):\n"
        "    send(connection, tag, data, wait)\n"
        "    if not data: os._exit(0)\n"
        "import sdp_lightning.rewards.worker_reward as worker\n"
        "worker.send = leave\n"
    )
    with closing(RewardPool(f"{file}:reward", on_kill="zero", num_workers=1)) as pool:
        assert call(pool, "any") == 0.0
        assert pool.counts == RewardCounts(crashed=1)


@linux
def test_neither_the_reward_nor_its_children_hold_the_trainers_connection(one: RewardPool) -> None:
    loaded = int(call(one, "parent_id"))
    keeper = parent_of(loaded)
    assert keeper != os.getpid()
    ours = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    theirs = {os.readlink(path) for path in Path(f"/proc/{loaded}/fd").iterdir()}
    kept = {os.readlink(path) for path in Path(f"/proc/{keeper}/fd").iterdir()}
    assert len([link for link in theirs if link.startswith("socket:")]) == 1
    assert not theirs & kept & {link for link in kept | ours if link.startswith("socket:")}
    assert call(one, "num_sockets") == 1
    assert call(one, "files_of_a_child") == 2


# What a reward leaves running ---------------------------------------------------------------------


@linux
@pytest.mark.parametrize("end", ["return", "leave", "kill the group"])
@pytest.mark.parametrize("num", [1, 20])
@pytest.mark.fault("process killed", "reward")
def test_children_in_sessions_of_their_own_end_with_their_call(
    one: RewardPool, tmp_path: Path, end: str, num: int
) -> None:
    worker = call(one, "parent_id")
    value = call(one, "daemon", folder=str(tmp_path), num=num, end=end)
    assert value == (1.0 if end == "return" else 0.0)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == num and not any(map(is_running, children))
    assert call(one, "parent_id") == worker


@linux
@pytest.mark.parametrize("end", ["return", "leave"])
@pytest.mark.fault("process killed", "reward")
def test_without_forks_they_end_with_the_worker(tmp_path: Path, end: str) -> None:
    settings: dict[str, Any] = {"num_workers": 1, "fork_calls": False}
    with closing(RewardPool(PLACE, on_kill="zero", **settings)) as pool:
        value = call(pool, "daemon", folder=str(tmp_path), num=3, end=end)
        assert value == (1.0 if end == "return" else 0.0)
        children = [int(path.name) for path in tmp_path.iterdir()]
        assert end != "return" or all(map(is_running, children))
    assert len(children) == 3 and not any(map(is_running, children))


@linux
def test_the_bound_on_processes_ends_a_call_that_runs_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the children of children, and those in sessions of their own."""
    for fork_calls in (True, False):
        folder = tmp_path / str(fork_calls)
        folder.mkdir()
        settings: dict[str, Any] = {"num_workers": 1, "fork_calls": fork_calls}
        with closing(
            RewardPool(PLACE, on_kill="zero", limits=WorkerLimits(processes=9), **settings)
        ) as pool:
            row = {"folder": str(folder), "end": "loop"}
            assert call(pool, "daemon", num=10, **row) == 0.0
            assert "ran more than 9 processes at once (limits.processes)" in caplog.text
            children = [int(path.name) for path in folder.iterdir()]
            assert not any(map(is_running, children))
            assert call(pool, "good") == 1.0
            assert pool.counts == RewardCounts(value=1, crashed=1)
        caplog.clear()


@linux
def test_a_fork_bomb_is_found_and_all_of_it_ended(tmp_path: Path) -> None:
    file = tmp_path / "first"
    with closing(
        RewardPool(PLACE, on_kill="zero", num_workers=1, limits=WorkerLimits(processes=50))
    ) as pool:
        assert call(pool, "bomb", file=str(file)) == 0.0
        assert group_of(int(file.read_text())) == []
        assert call(pool, "good") == 1.0
        assert pool.counts == RewardCounts(value=1, crashed=1)
