"""What ranks agree on, over a real store; and what they say when one is late, fails or is gone."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.distributed.failure_detector import (
    FailureDetector,
    Listener,
    RankFailure,
    connect,
)
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.servers.placement import require_one_host
from sdp_lightning.errors import ConfigError, RankError
from support.trainers import make_data, make_module, make_trainer

DEADLINE_S = 60.0


class World:
    """Ranks in threads of this process, with connections between rank 0 and every other."""

    def __init__(self, size: int = 2, **settings: Any) -> None:
        settings = {"timeout_s": DEADLINE_S} | settings
        self.pairs = [[socket.socketpair() for _ in range(1, size)] for _ in range(2)]
        links, lines = (
            [
                {rank: near for rank, (near, _) in enumerate(pairs, 1)},
                *({0: far} for _, far in pairs),
            ]
            for pairs in self.pairs
        )
        self.ranks = [RankGroup(links[r], rank=r, size=size, **settings) for r in range(size)]
        for ranks, line in zip(self.ranks, lines, strict=True):
            ranks.watch(line)

    def run(self, *work: Callable[[RankGroup], Any]) -> list[Any]:
        """What ``work`` returned or raised on each rank; one function is for all of them."""
        results: list[Any] = [None] * len(self.ranks)

        def one(rank: int) -> None:
            try:
                results[rank] = work[rank % len(work)](self.ranks[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        return results

    def close(self) -> None:
        for ranks in self.ranks:
            ranks.close()


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(*args: Any, **settings: Any) -> World:
        worlds.append(World(*args, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    assert "sdp-lifeline" not in [thread.name for thread in threading.enumerate()]


Make = Callable[..., World]


# Agreement ----------------------------------------------------------------------------------------


def test_alone_nobody_is_asked() -> None:
    ranks = RankGroup()
    assert ranks.all_gather("it", "mine") == ["mine"]
    assert ranks.run_on_all_ranks("it", lambda: 3, lambda n: n + 1) == (3, [4])
    assert ranks.broadcast("it", 5) == 5
    with pytest.raises(KeyError, match="mine"):
        ranks.run_on_all_ranks("it", lambda: {}["mine"])
    ranks.fail(ValueError())
    ranks.close()


def test_all_ranks_gather_the_same_in_order_of_rank(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return [ranks.all_gather(f"round {n}", (ranks.rank, n, {"x": None})) for n in range(20)]

    expected = [[(rank, n, {"x": None}) for rank in range(3)] for n in range(20)]
    assert make_world(3).run(work) == [expected] * 3


def test_the_value_of_rank_0_is_first(make_world: Make) -> None:
    assert make_world(3).run(lambda ranks: ranks.broadcast("it", ranks.rank + 7)) == [7, 7, 7]


def test_together_gives_each_its_own_result_and_what_all_tell(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return ranks.run_on_all_ranks("it", lambda: ranks.rank * 10, lambda n: n + 1)

    assert make_world(2).run(work) == [(0, [1, 11]), (10, [1, 11])]


def test_more_than_a_connection_takes_at_once_is_gathered(make_world: Make) -> None:
    sizes = [9 * 2**20, 3 * 2**20, 5]
    found = make_world(3).run(
        lambda ranks: [len(b) for b in ranks.all_gather("it", bytes(sizes[ranks.rank]))]
    )
    assert found == [sizes] * 3


def test_values_are_collected_on_rank_0_only_and_it_answers_nothing_of_them(
    make_world: Make,
) -> None:
    def work(ranks: RankGroup) -> Any:
        found = ranks.gather("saving", (ranks.rank, "x" * 3_000_000))
        return found and [(rank, len(words)) for rank, words in found], ranks.all_gather("on", 1)

    world = make_world(3)
    link = world.ranks[1]._links[0]
    receive, answers = link.receive, list[Any]()
    link.receive = lambda: answers.extend(values := receive()) or values  # type: ignore
    every = [(rank, 3_000_000) for rank in range(3)]
    assert world.run(work) == [(every, [1] * 3), (None, [1] * 3), (None, [1] * 3)]
    assert [value for _, _, value in answers] == [None, [1, 1, 1]]


def test_who_left_a_meeting_early_is_not_missed_there_and_hears_the_next_one() -> None:
    near, far = socket.socketpair()
    hurry = True
    first = RankGroup({1: near}, rank=0, size=2, timeout_s=DEADLINE_S)
    second = RankGroup({0: far}, rank=1, size=2, timeout_s=DEADLINE_S, interrupted=lambda: hurry)
    for number in range(2):
        with pytest.raises(RankError, match="interrupted while early"):
            second.all_gather("early", number)
    hurry = False
    assert [first.all_gather("early", "a"), first.all_gather("early", "b")] == [["a", 0], ["b", 1]]
    thread = threading.Thread(target=first.all_gather, args=("on time", "c"))
    thread.start()
    assert second.all_gather("on time", 2) == ["c", 2]
    thread.join(DEADLINE_S)
    first.close()
    second.close()


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.fault("exception", "gather")
def test_an_error_on_one_rank_is_raised_on_all_and_names_it(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        return ranks.run_on_all_ranks("sorting", lambda: [1][ranks.rank])

    first, second, third = make_world(3).run(work)
    assert isinstance(second, IndexError) and isinstance(third, IndexError)
    assert isinstance(first, RankError)
    assert str(first) == "rank 1 failed while sorting: IndexError: list index out of range"


def test_ranks_that_had_an_error_together_are_still_together(make_world: Make) -> None:
    def work(ranks: RankGroup) -> Any:
        try:
            ranks.run_on_all_ranks("sorting", lambda: [1][ranks.rank])
        except (RankError, IndexError):
            return ranks.all_gather("after it", ranks.rank)

    assert make_world(2).run(work) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.fault("hang", "gather")
def test_a_deadline_names_the_late_rank_what_was_awaited_and_what_was_done_last(
    make_world: Make, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr("sdp_lightning.distributed.rank_group._AFTER_S", 0.2)
    world = make_world(3)

    def work(ranks: RankGroup) -> None:
        ranks.all_gather("counting", 1)
        if ranks.rank != late:
            ranks.all_gather("sorting", 1, timeout_s=0.2)

    start = time.monotonic()
    found = world.run(work)
    assert time.monotonic() - start < DEADLINE_S / 2
    in_time = [result for rank, result in enumerate(found) if rank != late]
    assert all(isinstance(error, RankError) for error in in_time), found
    assert any(
        str(error).startswith("waited 0.")
        and f"for rank {late} while sorting" in str(error)
        and "did together was: counting" in str(error)
        for error in in_time
    ), found


@pytest.mark.fault("hang", "gather")
def test_a_rank_that_others_wait_for_in_vain_hears_of_it(make_world: Make) -> None:
    world = make_world(2)
    found = world.run(lambda ranks: ranks.all_gather("it", 1, timeout_s=0.1), lambda ranks: None)
    assert isinstance(found[0], RankError)
    error = RuntimeError("at last")
    world.ranks[1].fail(error)
    assert "waited 0.1 s for rank 1 while it" in error.__notes__[0]


@pytest.mark.fault("corrupted data", "gather")
def test_ranks_at_different_meetings_are_told_apart(make_world: Make) -> None:
    found = make_world(2).run(lambda ranks: ranks.all_gather(f"meeting {ranks.rank}", 1))
    assert [type(error) for error in found] == [RankError, RankError]
    assert str(found[1]) == "rank 1 is at 'meeting 1' while rank 0 is at 'meeting 0'."


def test_an_interrupted_wait_ends(make_world: Make) -> None:
    asked = threading.Event()
    world = make_world(2, interrupted=asked.is_set)
    threading.Timer(0.1, asked.set).start()
    found = world.run(lambda ranks: ranks.all_gather("it", 1), lambda ranks: asked.wait(DEADLINE_S))
    assert isinstance(found[0], RankError) and str(found[0]) == "interrupted while it."


# Failures -----------------------------------------------------------------------------------------


def wait_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


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

    start = time.monotonic()
    found = make_world(3).run(work)
    assert time.monotonic() - start < DEADLINE_S / 2
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(found[rank], RankError)
        assert str(found[rank]).startswith(f"rank {failing} failed: ValueError: no such letter")
        assert str(found[rank]).endswith("while sorting.")


def test_the_cause_is_noted_on_an_error_that_follows_from_it(make_world: Make) -> None:
    """A collective that another process has left raises by itself, and names no cause."""
    world = make_world(3)
    follows = RuntimeError("connection closed by peer")
    threading.Timer(0.2, lambda: world.ranks[2].fail(KeyError("letter"))).start()
    world.ranks[1].fail(follows)
    assert follows.__notes__ == ["Before that, rank 2 failed: KeyError: 'letter'"]
    assert world.ranks[0]._failure == RankFailure(2, "KeyError: 'letter'")


def test_an_error_that_is_its_own_cause_is_told(make_world: Make) -> None:
    world = make_world(2)
    own = RuntimeError("no memory")
    world.ranks[1].fail(own)
    assert wait_for(lambda: world.ranks[0]._failure)
    assert world.ranks[0]._failure == RankFailure(1, "RuntimeError: no memory")
    assert "__notes__" not in vars(own)


def test_to_close_is_no_failure(make_world: Make) -> None:
    world = make_world(3)
    for ranks in (world.ranks[1], world.ranks[0]):
        ranks.close()
        ranks.close()
    time.sleep(0.1)
    assert [ranks._failure for ranks in world.ranks] == [None] * 3


def test_a_failure_that_is_told_right_before_the_end_is_heard(make_world: Make) -> None:
    world = make_world(3)
    world.ranks[0].fail(ValueError("x" * 10_000))
    world.ranks[0].close()
    for rank in (1, 2):
        found = wait_for(lambda rank=rank: world.ranks[rank]._failure)
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
    assert "it is ended" in words and 'File "<string>", line' in words


# Connecting ---------------------------------------------------------------------------------------


@pytest.mark.fault("corrupted data", "gather")
@pytest.mark.parametrize("platform", [sys.platform, "another"])
def test_a_listener_takes_every_rank_once_and_no_stranger(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sdp_lightning.distributed.failure_detector.sys", SimpleNamespace(platform=platform)
    )
    listener = Listener("127.0.0.1")
    port, token = listener.place
    links = [
        connect("127.0.0.1", (port, bytes(16)), 1, DEADLINE_S),
        connect("127.0.0.1", (port, token), 2, DEADLINE_S),
        connect("127.0.0.1", (port, token), 1, DEADLINE_S),
    ]
    if isinstance(port, int):  # goes at once, with a reset
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        stranger.close()
        links.append(connect("127.0.0.1", (port, token), 3, DEADLINE_S))
    found = listener.accept(len(links), DEADLINE_S)
    assert sorted(found) == [*range(1, len(links))]
    links[2].sendall(b"here")
    assert found[1].recv(4) == b"here"
    assert links[0].recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", (port, token), 3, DEADLINE_S)
    for link in (*links, *found.values()):
        link.close()


@pytest.mark.fault("hang", "gather")
def test_a_rank_that_does_not_connect_is_named() -> None:
    listener = Listener("127.0.0.1")
    link = connect("127.0.0.1", listener.place, 1, DEADLINE_S)
    with pytest.raises(RankError, match=r"waited 0.1 s for rank 2, 3 to connect to rank 0"):
        listener.accept(4, 0.1)
    link.close()


@pytest.mark.fault("corrupted data", "gather")
@pytest.mark.fault("thread died", "gather")
def test_words_that_nobody_understands_are_a_failure_and_the_thread_that_hears_them_lives_on():
    own, others = socket.socketpair()
    line = FailureDetector(0, {1: own})
    try:
        others.sendall(b"\xff{not json\n")
        found = wait_for(lambda: line.failure)
        assert found.rank == 1 and "nobody understands" in found.message
        assert line._thread.is_alive()  # it ends the process if the main thread does not part
    finally:
        line.close()
        others.close()
    assert not line._thread.is_alive()


# Hosts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_hosts", "environment", "found"),
    [
        (1, {}, None),
        (1, {"WORLD_SIZE": "2"}, None),  # of ranks that Lightning started
        (1, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, None),
        (1, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, "(2 of 4 ranks are here)"),
        (2, {}, "(2 hosts)"),
    ],
)
def test_servers_that_not_all_hosts_would_reach_are_refused(
    num_hosts: int, environment: dict[str, str], found: str | None
) -> None:
    if found is None:
        require_one_host(num_hosts, environment)
        return
    with pytest.raises(ConfigError, match=re.escape(found)) as refused:
        require_one_host(num_hosts, environment)
    assert "pass engine='vllm://host:port,...'" in str(refused.value)


def test_a_data_module_on_several_hosts_starts_no_servers(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # which Lightning does not look at with one device
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    data = make_data(engine="vllm://launch?devices=cpu")
    with pytest.raises(ConfigError, match=r"1 of 2 ranks are here.*vllm serve"):
        trainer.fit(make_module(model_folder), data)
