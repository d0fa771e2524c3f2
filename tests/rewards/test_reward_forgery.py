"""Code that a reward runs cannot answer for it, nor outlive its worker."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.rewards import RewardCounts, RewardPool
from support.reward_pools import DEADLINE_S, PLACE, call, is_running
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


@pytest.fixture
def one() -> Iterator[RewardPool]:
    """A pool of one worker, with no deadline but a hang's."""
    with closing(RewardPool(PLACE, num_workers=1, timeout_s=DEADLINE_S)) as pool:
        yield pool


def loses_only_its_own_sample(pool: RewardPool, way: str, **row: Any) -> None:
    before = call(pool, "process_id")
    assert call(pool, way, honest=5, **row) == 0.0
    assert [call(pool, "good"), call(pool, "bad")] == [1.0, 0.0]
    assert call(pool, "process_id") != before
    assert pool.counts == RewardCounts(value=4, crashed=1)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("tag", [b"", b"\0" * 15 + b"\2"], ids=["no tag", "the call's number"])
@pytest.mark.fault("corrupted data", "reward")
def test_a_forged_answer_costs_its_own_sample_and_no_other(
    one: RewardPool, body: str, tag: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    loses_only_its_own_sample(one, "forge", body=body, tag=tag)
    assert "wrote into the connection of its process" in caplog.text


def test_an_answer_with_the_right_nonce_is_followed_by_the_honest_one_and_found(
    one: RewardPool,
) -> None:
    loses_only_its_own_sample(one, "forge_with_the_nonce", body='{"value": 777.0}')


@pytest.mark.parametrize("body", [b for k, b in BODIES.items() if k != "a value"], ids=lambda _: "")
def test_code_that_takes_a_worker_over_still_answers_in_the_right_form(
    one: RewardPool, body: str
) -> None:
    loses_only_its_own_sample(one, "take_over", body=body)


def test_an_answer_without_an_end_is_refused_at_once(one: RewardPool) -> None:
    """Not read: 3 MB of it would be in memory."""
    loses_only_its_own_sample(one, "forge_with_the_nonce", body="x" * 3_000_000)


def test_bytes_between_calls_cost_the_worker_and_no_sample(
    one: RewardPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = int(call(one, "process_id"))
    go, done = tmp_path / "go", tmp_path / "done"
    assert call(one, "forge_later", go=str(go), done=str(done)) == 1.0
    go.touch()
    wait_for(lambda: not is_running(before))
    with caplog.at_level(logging.WARNING):
        assert [call(one, "good"), call(one, "bad")] == [1.0, 0.0]
    assert "ended, or was written into, after its last answer" in caplog.text
    assert one.counts == RewardCounts(value=4)


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
    with closing(RewardPool(f"{file}:reward", num_workers=1)) as pool:
        assert call(pool, "any") == 0.0
        assert pool.counts == RewardCounts(crashed=1)


@linux
def test_neither_the_reward_nor_its_children_hold_the_trainers_connection(one: RewardPool) -> None:
    keeper = int(call(one, "parent_id"))
    assert keeper != os.getpid()
    ours = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    process = int(call(one, "process_id"))
    theirs = {os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()}
    kept = {os.readlink(path) for path in Path(f"/proc/{keeper}/fd").iterdir()}
    assert len([link for link in theirs if link.startswith("socket:")]) == 1
    assert not theirs & kept & {link for link in kept | ours if link.startswith("socket:")}
    assert call(one, "files_of_a_child") == 2


# What a reward leaves running ---------------------------------------------------------------------


@linux
@pytest.mark.parametrize("end", ["return", "leave", "kill the group", "loop"])
@pytest.mark.parametrize("num", [1, 20])
@pytest.mark.fault("process killed", "reward")
def test_children_in_sessions_of_their_own_end_with_the_worker(
    tmp_path: Path, end: str, num: int
) -> None:
    with closing(RewardPool(PLACE, num_workers=1, timeout_s=10.0)) as pool:
        value = call(pool, "daemon", folder=str(tmp_path), num=num, end=end)
        assert value == (1.0 if end == "return" else 0.0)
        children = [int(path.name) for path in tmp_path.iterdir()]
        assert len(children) == num
        assert end != "return" or all(map(is_running, children))
    assert not any(map(is_running, children))
