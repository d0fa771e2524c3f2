"""How ranks connect to rank 0, and which hosts they may be on."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.distributed.failure_detector import FailureDetector
from sdp_lightning.distributed.listener import (
    MAX_CANDIDATES,
    Listener,
    address_of,
    connect,
    listen_at,
)
from sdp_lightning.distributed.messaging import pack
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.servers.placement import require_one_host
from sdp_lightning.errors import ConfigError, RankError
from support.listening import TLS_HELLO
from support.rank_worlds import DEADLINE_S
from support.trainers import make_data, make_module, make_trainer
from support.waiting import wait_for


def beside(*work: Callable[[], Any]) -> list[Future[Any]]:
    """Do ``work`` in threads of their own; returns what each is to return."""
    pool = ThreadPoolExecutor(len(work))
    futures = [pool.submit(each) for each in work]
    pool.shutdown(wait=False)
    return futures


def where_of(listener: Listener, host: str = "127.0.0.1") -> tuple[Any, ...]:
    """The arguments of ``connect`` before the number."""
    return host, listener.address


def open_as_stranger(listener: Listener, host: str = "127.0.0.1") -> socket.socket:
    """A connection to ``listener`` of one who knows nothing."""
    place, _ = listener.address
    if isinstance(place, bytes):
        link = socket.socket(socket.AF_UNIX)
        link.connect(place)
        return link
    return socket.create_connection((host, place))


@pytest.fixture(params=[sys.platform, "another"])
def listener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """On a socket of this machine, and on a port as on other platforms."""
    platform = SimpleNamespace(platform=request.param)
    monkeypatch.setattr("sdp_lightning.distributed.listener.sys", platform)
    made = Listener("127.0.0.1")
    yield made
    made.close()


@pytest.mark.fault("corrupted data", "gather")
def test_a_listener_takes_every_rank_and_the_later_connection_of_one_that_comes_twice(
    listener: Listener,
) -> None:
    accepted, *_ = beside(lambda: listener.accept(3, DEADLINE_S))
    where = where_of(listener)
    links = [connect(*where, number, DEADLINE_S) for number in (1, 1, 2)]
    found = accepted.result(DEADLINE_S)
    assert sorted(found) == [1, 2]
    assert links[0].recv(1) == b""
    for number, link in enumerate(links[1:], 1):
        link.sendall(b"here")
        assert found[number].recv(4) == b"here"
    with pytest.raises(ConnectionRefusedError):
        connect(*where, 3, DEADLINE_S)
    for link in (*links, *found.values()):
        link.close()


def test_a_wait_that_an_exception_ends_leaves_no_connection_open(listener: Listener) -> None:
    """Neither of a rank that has proved itself, nor of a stranger."""
    stranger, (connecting,) = (
        open_as_stranger(listener),
        beside(lambda: connect(*where_of(listener), 1, DEADLINE_S)),
    )

    def is_cancelled() -> bool:
        if connecting.done():
            raise KeyError("of the caller")
        return False

    with pytest.raises(KeyError, match="of the caller"):
        listener.collect(3, DEADLINE_S, is_cancelled)
    with stranger, connecting.result() as rank:
        for link in (stranger, rank):
            link.settimeout(DEADLINE_S)
            while link.recv(4096):  # the nonce, to the stranger
                pass


@pytest.mark.fault("hang", "gather")
def test_a_rank_that_does_not_connect_is_named() -> None:
    listener = Listener("127.0.0.1")
    accepted, *_ = beside(lambda: listener.accept(4, 0.3))
    link = connect(*where_of(listener), 1, DEADLINE_S)
    with pytest.raises(RankError, match=r"waited 0.3 s for rank 2, 3 to connect to rank 0"):
        accepted.result(DEADLINE_S)
    link.close()


# Strangers ----------------------------------------------------------------------------------------


@pytest.mark.fault("corrupted data", "stranger")
def test_who_does_not_know_the_secret_is_turned_away_whatever_it_says(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that repeats what a rank has said to another listener, and one with no number."""
    accepted, *_ = beside(lambda: listener.accept(2, DEADLINE_S))
    host, (place, secret) = where_of(listener)
    words = [b"GET / HTTP/1.1\r\n\r\n" * 9, TLS_HELLO, secret * 3, b"\xff" * 10**6, overheard()]
    for said in words:
        with open_as_stranger(listener) as link, suppress(OSError):  # closed while it speaks
            assert len(link.recv(32)) == 32
            link.sendall(said)
            assert link.recv(1) == b""
    for number, known in ((1, bytes(32)), (0, secret), (2, secret), (2**31, secret)):
        with suppress(RankError):  # a rank that is none is answered, and closed
            link = connect(host, (place, known), number, DEADLINE_S)
            assert known == secret and link.recv(1) == b""
            link.close()
    link = connect(host, (place, secret), 1, DEADLINE_S)
    [found] = accepted.result(DEADLINE_S).values()
    link.sendall(b"here")
    assert found.recv(9) == b"here"
    assert f"{len(words) + 4} connections" in caplog.text
    link.close()
    found.close()


def overheard() -> bytes:
    """What a rank answers to a listener."""
    other = Listener("127.0.0.1")
    place, _ = other.address
    rank, *_ = beside(lambda: connect("127.0.0.1", (place, bytes(32)), 1, DEADLINE_S))
    with other._server as server:
        server.setblocking(True)
        link, _ = server.accept()
        with link:
            link.sendall(bytes(32))
            answer = link.recv(99)
    with pytest.raises(RankError, match="it closed the connection"):
        rank.result(DEADLINE_S)
    return answer


@pytest.mark.fault("hang", "stranger")
@pytest.mark.fault("slow", "stranger")
def test_strangers_that_are_silent_or_drip_delay_neither_a_rank_nor_the_deadline(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have all the time that they want, so only the deadline of all can end the wait."""
    monkeypatch.setattr("sdp_lightning.distributed.listener._GREETING_S", 1e9)
    with ExitStack() as closing:
        strangers = [closing.enter_context(open_as_stranger(listener)) for _ in range(5)]

        def drip() -> None:
            with suppress(OSError):
                while True:
                    strangers[0].sendall(b"x")
                    strangers[0].recv(32)  # until it is closed

        accepted, *_ = beside(lambda: listener.accept(3, 0.5), drip)
        closing.enter_context(connect(*where_of(listener), 1, DEADLINE_S))
        said = "waited 0.5 s for rank 2 to connect to rank 0"
        with pytest.raises(RankError, match=said):
            accepted.result(DEADLINE_S)
        assert strangers[4].recv(32) and strangers[4].recv(1) == b""


def test_a_stranger_is_not_waited_for_longer_than_for_its_greeting(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdp_lightning.distributed.listener._GREETING_S", 0.0)
    accepted, *_ = beside(lambda: listener.accept(2, DEADLINE_S))
    with open_as_stranger(listener) as link:
        assert link.recv(32) and link.recv(1) == b""
    monkeypatch.undo()
    link = connect(*where_of(listener), 1, DEADLINE_S)
    accepted.result(DEADLINE_S)[1].close()
    link.close()


@pytest.mark.fault("process killed", "stranger")
def test_a_crowd_is_bounded_and_the_newest_is_heard(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that came first have to go, those that reset their connection at once are nothing."""
    monkeypatch.setattr("sdp_lightning.distributed.listener._GREETING_S", 1e9)
    size = 4
    accepted, *_ = beside(lambda: listener.accept(size, DEADLINE_S))
    with ExitStack() as closing:
        crowd = [
            closing.enter_context(open_as_stranger(listener))
            for _ in range(MAX_CANDIDATES + size + 9)
        ]
        gone = open_as_stranger(listener)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        gone.close()
        for link in crowd:
            assert link.recv(32)
        crowd[8].settimeout(DEADLINE_S)
        assert crowd[8].recv(1) == b""
        crowd[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # still a candidate
            crowd[-1].recv(1)
        for number in range(1, size):
            closing.enter_context(connect(*where_of(listener), number, DEADLINE_S))
        for link in accepted.result(DEADLINE_S).values():
            closing.enter_context(link)


def test_a_queue_that_strangers_have_filled_is_waited_for(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener._server.listen(0)
    with ExitStack() as closing:
        closing.enter_context(open_as_stranger(listener))  # as many as the queue takes
        rank, *_ = beside(lambda: connect(*where_of(listener), 1, DEADLINE_S))
        if isinstance(listener.address[0], bytes):
            with pytest.raises(TimeoutError, match="queue of connections is full"):
                connect(*where_of(listener), 1, 0.0)
        closing.enter_context(listener.accept(2, DEADLINE_S)[1])
        closing.enter_context(rank.result(DEADLINE_S))


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"", "has not proved within 0.2 s that it is of this run: timed out"),
        (bytes(32), "has not proved within 0.2 s that it is of this run: timed out"),
        (bytes(64), "does not know the secret of this run"),
        (b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(99), "does not know the secret of this run"),
    ],
    ids=["silent", "half", "zeros", "another program"],
)
@pytest.mark.fault("exception", "stranger")
def test_a_rank_believes_no_listener_that_does_not_know_the_secret(says: bytes, match: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        rank, *_ = beside(lambda: connect("127.0.0.1", (port, bytes(32)), 1, 0.2))
        link, _ = server.accept()
        with link:
            link.sendall(says)
            with pytest.raises(RankError, match=rf"who listens on 127.0.0.1:{port} {match}"):
                rank.result(DEADLINE_S)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.fault("corrupted data", "stranger")
@pytest.mark.parametrize("key", [b"", b"another"], ids=["no key", "another key"])
def test_what_is_not_signed_with_the_secret_is_not_unpickled(key: bytes, tmp_path: Path) -> None:
    near, far = socket.socketpair()
    ranks = RankGroup({1: near}, rank=0, size=2, timeout_s=DEADLINE_S, key=b"secret")
    far.sendall(pack((1, "counting", Harm(tmp_path / "harm")), key))
    with pytest.raises(RankError, match="not signed with the run's secret"):
        ranks.all_gather("counting", 1)
    assert not (tmp_path / "harm").exists()
    far.close()
    ranks.close()


# Addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "bound"),
    [
        (["127.0.0.1", "127.0.1.1", "::1"], "a socket of this machine"),
        (["127.0.0.1", "127.0.0.2", "127.0.0.2"], "127.0.0.2"),
        (["127.0.0.2", "127.0.0.3"], "all"),  # two networks
        (["192.0.2.1"], "all"),  # a forwarded address
        (["", "127.0.0.2"], "all"),  # a rank that cannot resolve MASTER_ADDR
    ],
)
def test_rank_0_listens_where_the_others_see_it_and_on_all_addresses_only_if_it_must(
    seen: list[str], bound: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(  # two of this machine's addresses stand for ones of a network
        "sdp_lightning.distributed.listener._is_loopback",
        lambda address: address in ("127.0.0.1", "127.0.1.1", "::1"),
    )
    listener = listen_at(seen)
    name = listener._server.getsockname()
    if bound == "a socket of this machine":
        assert isinstance(name, bytes)
    else:
        assert name[0] in (("::", "0.0.0.0") if bound == "all" else (bound,))
    assert ("listens on all of its addresses" in caplog.text) == (bound == "all")
    listener.close()
    assert address_of("127.0.0.1") == "127.0.0.1" and address_of("no such host.") == ""


# The failure detector -----------------------------------------------------------------------------


@pytest.mark.fault("corrupted data", "gather")
@pytest.mark.fault("thread died", "gather")
@pytest.mark.parametrize("said", [b"\xff{not json\n", b"7\n", b"[1]\n", b'{"a": 1}\n'])
def test_words_that_nobody_understands_are_a_failure_and_the_thread_that_hears_them_lives_on(
    said: bytes,
) -> None:
    own, others = socket.socketpair()
    line = FailureDetector(0, {1: own})
    try:
        others.sendall(said)
        found = wait_for(lambda: line.failure)
        assert found.rank == 1 and "is not valid" in found.message
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
