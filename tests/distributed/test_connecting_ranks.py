"""How ranks connect to rank 0, and which hosts they may be on."""

from __future__ import annotations

import re
import socket
import sys
from types import SimpleNamespace

import pytest

import sdp_lightning as sdp
from sdp_lightning.distributed.failure_detector import (
    FailureDetector,
    Listener,
    connect,
)
from sdp_lightning.engines.servers.placement import require_one_host
from sdp_lightning.errors import ConfigError, RankError
from support.rank_worlds import DEADLINE_S
from support.trainers import make_data, make_module, make_trainer
from support.waiting import wait_for


@pytest.mark.fault("corrupted data", "gather")
@pytest.mark.parametrize("platform", [sys.platform, "another"])
def test_a_listener_takes_every_rank_once_and_no_stranger(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sdp_lightning.distributed.failure_detector.sys", SimpleNamespace(platform=platform)
    )
    listener = Listener("127.0.0.1")
    port, token = listener.address
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
    link = connect("127.0.0.1", listener.address, 1, DEADLINE_S)
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
