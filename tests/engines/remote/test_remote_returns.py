"""Servers that come back: after a failed load, and while publishes go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest

from sdp_lightning.engines.remote import engine as engine_module, server_pool as fleet_module
from sdp_lightning.engines.remote.http_client import ServerError
from sdp_lightning.engines.remote.replicas import ReplicaSet
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import FileTransport
from sdp_lightning.weights.protocol import Target
from support.fake_servers import GENERATE, Server, connected, is_back, servers, weights
from support.remote_engines import generate, publish, request


@pytest.fixture
def one() -> Iterator[Server]:
    with servers(1) as (server,):
        yield server


@pytest.fixture
def two() -> Iterator[list[Server]]:
    with servers(2) as running:
        yield running


@pytest.mark.fault("exception", "publish")
def test_a_server_whose_last_load_failed_samples_nothing_before_it_has_a_whole_set(one: Server):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        one.fault("/collective_rpc", "load", times=1)
        engine.pause()
        with pytest.raises(EngineError, match="0 servers are left"):
            engine.update_weights(weights(1.0), 1)
    assert one.do()["version"] == "loading"
    with connected(one) as engine:
        assert not one.do()["dead"]
        publish(engine, 7, reset=True)
        assert [segment.version for segment in generate(engine, request())] == [7]
    assert not one.do()["dead"]


class LiveFiles(FileTransport):
    """Files that must not be read outside a publish, as a trainer's own tensors."""

    @property
    def is_live(self) -> bool:
        return True


def use_transport(transport: FileTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines carry weights by ``transport``."""
    monkeypatch.setattr(engine_module, "make_transport", lambda options, urls: transport)


def test_what_is_at_rest_in_publishes_only_reaches_a_returning_server_in_the_next_one(
    two: list[Server], monkeypatch: pytest.MonkeyPatch
):
    use_transport(LiveFiles(), monkeypatch)
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        two[1].restart()
        replica = engine._running().replicas[1]
        while not replica.waits_for_publish:
            two[0].do()
        assert not replica.serving and two[1].do()["loads"] == []
        publish(engine, 1)
        state = two[1].do()
        assert (state["version"], len(state["loads"])) == ("1", 2)  # base, and what came since
        assert replica.serving and replica.handshake_done and engine.num_serving == 2


class Failing(FileTransport):
    """Raises what no engine does."""

    async def deliver(self, target: Target, *, whole: bool) -> None:
        if not whole:
            raise RuntimeError("NCCL error")
        await super().deliver(target, whole=whole)


@pytest.mark.fault("exception", "publish")
def test_whatever_a_transfer_raises_the_engine_is_unusable_after_it(
    one: Server, monkeypatch: pytest.MonkeyPatch
):
    use_transport(Failing(), monkeypatch)
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        engine.pause()
        with pytest.raises(RuntimeError, match="NCCL error"):
            engine.update_weights(weights(1.0), 1)
        with pytest.raises(EngineError, match="unusable since: NCCL error"):
            engine.resume()


def test_a_server_without_what_it_needs_is_told_what(one: Server):
    one.fault("/resume", "404")
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"), connected(one):
        pass
    one.do(reset={})
    one.fault("/collective_rpc", "500")
    with pytest.raises(EngineError, match="--worker-extension-cls sdp_lightning"), connected(one):
        pass


def test_what_is_known_of_a_server_that_is_out_stands_beside_its_error():
    replicas = ReplicaSet(["http://a", "http://b"], lambda url: f"The end of its log: {url[-1]}.")
    replicas.bring_in(replicas.replicas[1])
    replicas.take_out(replicas.replicas[0], EngineError("no answer."))
    assert replicas.describe_lost() == "http://a: no answer. The end of its log: a."


def test_a_server_that_fails_whenever_it_returns_is_tried_less_often_while_others_are_enough(
    two: list[Server], monkeypatch: pytest.MonkeyPatch
):
    """At most every 32 intervals of its health; at once where it is needed."""
    second = 0.0
    monkeypatch.setattr(fleet_module, "monotonic", lambda: second)
    ill = two[1]
    with connected(*two, health_interval_s=1000.0, recover_s=0.1) as engine:
        pool = engine._running()
        publish(engine, 0, reset=True)
        ill.fault(GENERATE, "500")
        replica = pool.replicas[1]
        pool._set.take_out(replica, EngineError("it failed."))

        def seconds_of_tries(first: int, last: int) -> list[int]:
            nonlocal second
            found: list[int] = []
            for now in range(first, last, 1000):
                second, before = float(now), ill.do()["received"].get("/pause", 0)
                with contextlib.suppress(ServerError):
                    engine._http.run(pool._bring_back(replica, 0), 60.0)
                if ill.do()["received"].get("/pause", 0) > before:
                    found.append(now // 1000)
            return found

        assert seconds_of_tries(0, 130_000) == [0, 2, 6, 14, 30, 62, 94, 126]
        pool._set.take_out(pool.replicas[0], EngineError("it is gone, too."))
        assert seconds_of_tries(130_000, 133_000) == [130, 131, 132]
        ill.do(faults=[])
        assert seconds_of_tries(133_000, 134_000) == [133] and replica.serving
        assert [segment.version for segment in generate(engine, request())] == [0]
        assert replica.num_returns == 0


def test_groups_of_a_lost_server_move_back_to_where_least_is_out_when_it_returns():
    async def homes() -> list[str]:
        replicas = ReplicaSet(["http://a", "http://b"])
        first, second = replicas.replicas
        replicas.bring_in(first)
        found = [(await replicas.choose("group", 1.0)).url]
        first.outstanding.add(asyncio.Future())
        found.append((await replicas.choose("group", 1.0)).url)  # where its prefix is
        replicas.bring_in(second)
        found.append((await replicas.choose("group", 1.0)).url)
        return found

    assert asyncio.run(homes()) == ["http://a", "http://a", "http://b"]


class SlowFiles(FileTransport):
    """Its first whole delivery to a server that came back lasts until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.go_on = threading.Event(), threading.Event()
        self.armed = False

    async def deliver(self, target: Target, *, whole: bool) -> None:
        if self.armed and whole:
            self.armed = False
            self.waits.set()
            assert await asyncio.to_thread(self.go_on.wait, 60.0)
        await super().deliver(target, whole=whole)


def test_a_publish_leaves_a_server_alone_that_is_still_being_loaded(
    two: list[Server], monkeypatch: pytest.MonkeyPatch
):
    slow = SlowFiles()
    use_transport(slow, monkeypatch)
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        slow.armed = True
        two[1].restart()
        assert slow.waits.wait(60.0)
        publish(engine, 1)
        assert two[1].do()["loads"] == [] and two[1].do()["version"] == "loading"
        slow.go_on.set()
        is_back(engine, two[0], 2)  # without another publish, at the next look at it
        assert two[1].do()["version"] == "1" and two[1].do()["weights"] == {"a": 1.0, "b": 1.0}
        publish(engine, 2)
        assert two[1].do()["version"] == "2" and engine.num_serving == 2
        assert two[1].do()["weights"] == {"a": 2.0, "b": 2.0}
