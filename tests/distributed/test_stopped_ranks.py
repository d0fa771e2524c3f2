"""A rank that is stopped (SIGSTOP) hears nothing; it is found, named and killed."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdp_lightning.distributed.failure_detector import FailureDetector
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.distributed.stopped_ranks import StoppedRanks
from support.rank_worlds import DEADLINE_S
from support.waiting import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel names the process")

WAITS = """
import socket, sys
links = [socket.socket(socket.AF_UNIX) for _ in range(2)]
for link in links:
    link.connect(sys.argv[1])
links[0].recv(1)
"""


@dataclass
class Rank:
    """Another rank: a process, and both connections to it."""

    process: subprocess.Popen[bytes]
    links: list[socket.socket]

    def send(self, signum: int) -> None:
        """Send the signal, and wait until it has stopped the process, or let it go on."""
        self.process.send_signal(signum)
        os.waitpid(self.process.pid, os.WUNTRACED if signum == signal.SIGSTOP else os.WCONTINUED)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Rank]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "it"))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        command = [sys.executable, "-SEc", WAITS, str(tmp_path / "it")]
        with subprocess.Popen(command) as process:
            links = [listener.accept()[0] for _ in range(2)]
            yield Rank(process, links)
            process.kill()
    for link in links:
        link.close()


def test_looks_in_a_row_are_counted_and_a_rank_that_goes_on_is_left_alone(other: Rank) -> None:
    ranks = StoppedRanks({1: other.links[0]}, limit_s=3.0)
    assert ranks.kill() == []
    for _ in range(2):
        other.send(signal.SIGSTOP)
        assert [ranks.look() for _ in range(3)] == [None] * 3
        other.send(signal.SIGCONT)
        assert ranks.look() is None
    other.send(signal.SIGSTOP)
    assert [ranks.look() for _ in range(3)] == [None] * 3
    assert ranks.look() == (1, "it has been stopped (SIGSTOP) for 3 s.")
    assert ranks.kill() == [
        f"rank 1 was stopped (SIGSTOP), and is killed: process {other.process.pid}."
    ]
    assert other.process.wait(DEADLINE_S) == -signal.SIGKILL
    assert ranks.kill() == [] and ranks.look() is None


@pytest.mark.fault("hang", "gather")
def test_a_rank_that_is_stopped_too_long_has_failed_and_is_killed(other: Rank) -> None:
    detector = FailureDetector(0, {1: other.links[0]}, stopped_s=3.0, look_s=0.01)
    try:
        other.send(signal.SIGSTOP)
        wait_for(lambda: detector.failure is not None, lambda: detector.failure)
        assert str(detector.failure) == "rank 1 failed: it has been stopped (SIGSTOP) for 3 s."
        assert other.process.wait(DEADLINE_S) == -signal.SIGKILL
    finally:
        detector.close()


def test_a_rank_that_is_stopped_when_another_fails_is_killed_and_named(other: Rank) -> None:
    ranks = RankGroup({1: other.links[0]}, rank=0, size=2, timeout_s=DEADLINE_S)
    ranks.watch({1: other.links[1]})
    try:
        other.send(signal.SIGSTOP)
        error = ValueError("of rank 0")
        ranks.fail(error)
        (note,) = error.__notes__
        assert note.startswith("rank 1 was stopped (SIGSTOP), and is killed")
        assert other.process.wait(DEADLINE_S) == -signal.SIGKILL
    finally:
        ranks.close()


def test_where_the_process_cannot_be_known_nobody_is_watched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    own, same = socket.socketpair()  # both ends are this process
    with near, far, own, same:
        assert not StoppedRanks({1: near, 2: own}, limit_s=1.0).can_look


RANK_1 = """
import ctypes, signal, socket, sys, threading
from sdp_lightning.distributed.failure_detector import FailureDetector
from sdp_lightning.distributed.stopped_ranks import go_on_without_parent
libc, present = ctypes.CDLL(None), ctypes.c_int()
for asked, found in ((signal.SIGTERM, signal.SIGTERM), (0, signal.SIGCONT)):
    libc.prctl(1, asked)
    go_on_without_parent()
    libc.prctl(2, ctypes.byref(present))
    assert present.value == found, present
detector = FailureDetector(1, {0: socket.socket(fileno=int(sys.argv[1]))}, grace_s=0.0)
print("ready", flush=True)
threading.Event().wait()
"""
RANK_0 = """
import socket, subprocess, sys
own, other = socket.socketpair()
command = [sys.executable, "-c", sys.argv[1], str(other.fileno())]
rank_1 = subprocess.Popen(command, pass_fds=[other.fileno()])
other.close()
print(rank_1.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.fault("process killed", "gather")
def test_a_rank_that_is_stopped_when_rank_0_is_killed_goes_on_and_ends(tmp_path: Path) -> None:
    """It keeps its end of a pipe, which closes when it has ended, and not by a signal of ours."""
    command, pipe = [sys.executable, "-c", RANK_0, RANK_1], subprocess.PIPE
    with (tmp_path / "log").open("wb") as log:
        rank_0 = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log)
    assert rank_0.stdin is not None and rank_0.stdout is not None
    with rank_0.stdin, rank_0.stdout:
        pid, ready = int(rank_0.stdout.readline()), rank_0.stdout.readline()
        assert ready == b"ready\n", (tmp_path / "log").read_text()
        os.kill(pid, signal.SIGSTOP)
        state = Path(f"/proc/{pid}/stat")
        wait_for(lambda: state.read_text().split()[2] == "T", state.read_text)
        rank_0.kill()
        has_ended, _, _ = select.select([rank_0.stdout], [], [], DEADLINE_S)
        if not has_ended:
            os.kill(pid, signal.SIGKILL)
        assert has_ended and rank_0.stdout.read() == b""
        rank_0.wait(DEADLINE_S)
    assert "rank 0 failed: its process has ended." in (tmp_path / "log").read_text()
