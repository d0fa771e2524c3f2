"""A rank that fails or dies ends the waits of all others, with its error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sdp_lightning.distributed.failure_detector import (
    FailureDetector,
    RankFailure,
)
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RankError
from support.rank_worlds import DEADLINE_S, Make
from support.waiting import wait_for


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.fault("exception", "gather")
def test_a_failure_ends_the_wait_of_all_others_with_its_error(
    make_world: Make, failing: int
) -> None:
    def work(ranks: RankGroup) -> None:
        if ranks.rank == failing:
            ranks.fail(ValueError("no such letter"))
        else:
            ranks.all_gather("sorting", 1)

    found = make_world(3).run(work)
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(found[rank], RankError)
        assert str(found[rank]).startswith(f"rank {failing} failed: ValueError: no such letter")
        assert str(found[rank]).endswith("while sorting.")


def test_the_cause_is_noted_on_an_error_that_follows_from_it(
    make_world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective that another process has left raises by itself, and names no cause."""
    world = make_world(3)
    monkeypatch.setattr("sdp_lightning.distributed.rank_group._CAUSE_S", DEADLINE_S)
    follows = RuntimeError("connection closed by peer")
    threading.Timer(0.2, lambda: world.ranks[2].fail(KeyError("letter"))).start()
    world.ranks[1].fail(follows)
    assert follows.__notes__ == ["Before that, rank 2 failed: KeyError: 'letter'"]
    assert world.ranks[0].failure == RankFailure(2, "KeyError: 'letter'")


def test_an_error_that_is_its_own_cause_is_told(make_world: Make) -> None:
    world = make_world(2)
    own = RuntimeError("no memory")
    world.ranks[1].fail(own)
    assert wait_for(lambda: world.ranks[0].failure) == RankFailure(1, "RuntimeError: no memory")
    assert "__notes__" not in vars(own)


def test_to_close_is_no_failure(make_world: Make) -> None:
    world = make_world(3)
    for _ in range(2):
        world.ranks[1].close()
    world.ranks[2].fail(ValueError("later"))
    assert wait_for(lambda: world.ranks[0].failure) == RankFailure(2, "ValueError: later")


def test_a_failure_that_is_told_right_before_the_end_is_heard(make_world: Make) -> None:
    world = make_world(3)
    world.ranks[0].fail(ValueError("x" * 10_000))
    world.ranks[0].close()
    for rank in (1, 2):
        found = wait_for(lambda rank=rank: world.ranks[rank].failure)
        assert found.rank == 0 and found.message.startswith("ValueError: xxx")


@pytest.mark.fault("process killed", "gather")
def test_a_process_that_is_killed_is_missed_at_once_by_all(make_world: Make) -> None:
    """Its end of the connection is closed by the kernel."""
    held, end = socket.socketpair()
    other, another = socket.socketpair()
    first, third = FailureDetector(0, {1: held, 2: other}), FailureDetector(2, {0: another})
    try:
        end.close()
        assert wait_for(lambda: third.failure) == RankFailure(1, "its process has ended.")
        assert first.failure == third.failure
    finally:
        third.close()
        first.close()


# Processes ----------------------------------------------------------------------------------------


def be_rank_1(end: socket.socket, pipe: Connection) -> None:
    ranks = RankGroup({0: end}, rank=1, size=2, timeout_s=DEADLINE_S)
    ranks.all_gather("starting", 1)
    pipe.send("started")
    try:
        ranks.all_gather("sorting", 1)
    except RankError as error:
        pipe.send(str(error))


def be_rank_0(end: socket.socket, pipe: Connection) -> None:
    RankGroup({1: end}, rank=0, size=2, timeout_s=DEADLINE_S).all_gather("starting", 0)
    pipe.send("started")
    time.sleep(DEADLINE_S)


@pytest.mark.fault("process killed", "gather")
def test_a_rank_0_that_is_gone_is_named() -> None:
    context = multiprocessing.get_context("fork")
    ends, pipes = socket.socketpair(), [context.Pipe() for _ in range(2)]
    first, second = (
        context.Process(target=work, args=(end, pipe[1]), daemon=True)
        for work, end, pipe in zip((be_rank_0, be_rank_1), ends, pipes, strict=True)
    )
    first.start()
    ends[0].close()  # else rank 1 would hold a copy of it
    second.start()
    ends[1].close()
    (near, _), (here, _) = pipes
    assert near.recv() == here.recv() == "started"
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    assert here.poll(DEADLINE_S)
    assert here.recv() == "rank 0 is gone. It was waited for while sorting."
    second.join(DEADLINE_S)
    first.join(DEADLINE_S)


STUCK = """
import ctypes, socket, sys
from sdp_lightning.distributed.failure_detector import FailureDetector
link = socket.socket(fileno=int(sys.argv[1]))
FailureDetector(1, {0: link}, grace_s=0.3)
ctypes.CDLL(None).sleep(60)  # as in a collective: in C, without the interpreter's lock
"""


@pytest.mark.fault("hang", "gather")
def test_a_process_that_is_stuck_after_a_failure_is_ended_and_says_why(tmp_path: Path) -> None:
    near, far = socket.socketpair()
    stuck = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(far.fileno())],
        pass_fds=[far.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    far.close()
    near.sendall(b'[0, "ValueError: no such letter"]\n')
    _, words = stuck.communicate(timeout=DEADLINE_S)
    near.close()
    assert stuck.returncode == 1
    assert "rank 0 failed: ValueError: no such letter" in words
    assert "exiting with status 1" in words and 'File "<string>", line' in words
