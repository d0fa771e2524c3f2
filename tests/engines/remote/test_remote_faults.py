"""Servers that fail in every way and every phase: recovery or a named error, never a hang."""

from __future__ import annotations

import asyncio
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from sdp_lightning.engines.remote.backend import Call
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.http_client import HttpClient, ServerError
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import EngineError, RolloutError
from support.fake_servers import (
    GENERATE,
    QUICK,
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import Sending, assert_exact, generate, publish, request
from support.rollouts import Samples, rolling, wait_until

KINDS = ["500", "hang", "disconnect", "garbage", "odd", "bytes", "truncated"]
SHORT: dict[str, Any] = {
    "health_timeout_s": 1.0,
    "answer_timeout_s": 1.0,
    "control_timeout_s": 1.0,
    "request_timeout_s": 1.0,
}


def limits(kind: str, *, recover_s: float = 1.0) -> dict[str, Any]:
    """Deadlines that are short only where one is to pass, so that a slow machine passes none."""
    return (SHORT if kind == "hang" else {}) | {"recover_s": recover_s, "max_tries": 3}


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    with servers(2) as running:
        yield running


@pytest.fixture
def two(pair: list[Server]) -> list[Server]:
    for server in pair:
        server.do(reset={}, faults=[])
    return pair


@pytest.fixture
def one(two: list[Server]) -> Server:
    return two[0]


@pytest.fixture
def fresh() -> Iterator[list[Server]]:
    """Two servers that a test may kill."""
    with servers(2) as running:
        yield running


def is_back(engine: RemoteInfEngine, server: Server, count: int = 1) -> None:
    """Wait until ``count`` servers serve; ``server`` is asked meanwhile, so nothing spins."""
    deadline = time.monotonic() + 100.0
    while time.monotonic() < deadline:
        if engine.num_serving == count:
            return
        server.do()
    raise AssertionError(engine._running()._set.describe_lost())


# Every phase, every fault -------------------------------------------------------------------------

CONNECT = ["/health", "/v1/models", GENERATE, "/resume"]
ALSO_ASKED = ["/weight_info", "/get_world_size", "/collective_rpc"]
PHASES = {
    "pause": "/pause",
    "load": "/collective_rpc",
    "set version": "/update_weight_version",
    "verify": "/weight_info",
    "resume": "/resume",
}


@pytest.mark.parametrize(
    ("path", "kind"),
    [*product(CONNECT, KINDS), *product(ALSO_ASKED, ["500", "disconnect", "garbage"])],
)
def test_a_fault_while_connecting_names_the_server(one: Server, path: str, kind: str):
    one.fault(path, kind)
    engine = make_engine(one, **limits(kind))
    if kind == "odd" and path == "/health":  # its status alone counts
        engine.start()
        engine.close()
    else:
        with pytest.raises(EngineError, match=f"cannot use the vllm server at {one.url}"):
            engine.start()
    assert_nothing_left()


@pytest.mark.parametrize("kind", [*KINDS, "ignored", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault(
    "corrupted data", "publish", only="-(garbage|odd|bytes|truncated|wrong|ignored)$"
)
def test_a_fault_in_a_publish_of_two_costs_one_server_which_comes_back(
    two: list[Server], phase: str, kind: str
):
    well, ill = two
    with connected(*two, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        ill.fault(PHASES[phase], kind)
        publish(engine, 1)
        assert engine.version == 1
        ill.do(faults=[])
        is_back(engine, well, 2)
        for server in two:
            assert server.do()["version"] == "1" and server.do()["weights"] == {"a": 1.0, "b": 1.0}
        sending = Sending(engine, [request() for _ in range(4)])
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}


@pytest.mark.parametrize("kind", ["500", "hang", "disconnect", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault(
    "corrupted data", "publish", only="-(garbage|odd|bytes|truncated|wrong|ignored)$"
)
def test_a_fault_in_a_publish_under_requests_that_servers_keep_loses_none_of_them(
    two: list[Server], phase: str, kind: str
):
    well, ill = two
    options = limits(kind, recover_s=30.0) | {"on_update": "keep", "request_timeout_s": 60.0}
    with connected(*two, **options) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.do(held=True)
        sending = Sending(engine, [request() for _ in range(4)])
        for server in two:
            server.do(wait={"running": 2})
        ill.fault(PHASES[phase], kind)
        publish(engine, 1)
        ill.do(faults=[])
        for server in two:
            server.do(held=False)
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}
        is_back(engine, well, 2)
        assert ill.do()["version"] == "1"


@pytest.mark.parametrize("kind", [*KINDS, "ignored", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault(
    "corrupted data", "publish", only="-(garbage|odd|bytes|truncated|wrong|ignored)$"
)
def test_a_fault_in_a_publish_to_the_only_server_is_a_named_error(
    one: Server, phase: str, kind: str
):
    path, held = PHASES[phase], {"ignored": "0", "wrong": "41"}
    harmless = (kind, phase) not in [("ignored", "set version"), ("wrong", "verify")] and (
        kind in ("ignored", "wrong") or (kind == "load" and phase != "load")
    )
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault(path, kind)
        if harmless:
            publish(engine, 1)
            return
        # Both versions are named where the server has another one than expected.
        reason = f"reports version '{held[kind]}' instead of 1" if kind in held else ":"
        with pytest.raises(EngineError, match=rf"0 servers are left, min_replicas is 1.*{reason}"):
            publish(engine, 1)
        for call in (engine.pause, engine.resume, lambda: generate(engine, request())):
            with pytest.raises(EngineError, match="unusable since"):
                call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("exception", "generate", only="^(500|disconnect)$")
@pytest.mark.fault("hang", "generate", only="^hang$")
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|bytes|truncated)$")
def test_a_fault_while_generating_is_sent_again(one: Server, kind: str):
    with connected(one, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        publish(engine, 1)
        one.fault(GENERATE, kind, times=1)
        [segment] = generate(engine, request())
        assert segment.version == 1 and len(segment) == 4
        assert engine.num_generated == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("exception", "generate", only="^(500|disconnect)$")
@pytest.mark.fault("hang", "generate", only="^hang$")
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|bytes|truncated)$")
def test_a_server_that_never_samples_again_is_a_named_error(one: Server, kind: str):
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault(GENERATE, kind)
        with pytest.raises(EngineError, match=one.url):
            generate(engine, request())


@pytest.mark.parametrize("kind", ["500", "hang", "disconnect", "truncated"])
def test_an_ill_health_takes_a_server_out_until_it_is_well(one: Server, kind: str):
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault("/health", kind)
        is_back(engine, one, 0)
        with pytest.raises(EngineError, match=r"no server has been left for 1.0 s.*/health"):
            generate(engine, request())
        one.do(faults=[])
        is_back(engine, one)
        assert [s.version for s in generate(engine, request())] == [0]


def test_a_publish_waits_for_the_only_server_to_come_back(one: Server):
    with connected(one, **limits("500", recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        one.fault("/health", "500", times=1)
        is_back(engine, one, 0)
        publish(engine, 1)
        assert [s.version for s in generate(engine, request())] == [1]


@pytest.mark.fault("exception", "publish")
def test_too_few_servers_end_a_publish_with_the_reason(two: list[Server]):
    with connected(*two, **limits("500"), min_replicas=2) as engine:
        publish(engine, 0, reset=True)
        two[1].fault("/health", "500")
        is_back(engine, two[0], 1)
        with pytest.raises(EngineError, match=r"1 servers have been left for 1.0 s.*answered 500"):
            engine.pause()


@pytest.mark.fault("exception", "publish")
def test_a_publish_whose_weights_fit_nowhere_names_every_server(two: list[Server]):
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.fault("/collective_rpc", "load")
        with pytest.raises(EngineError, match=f"{two[0].url}.*safetensors.*{two[1].url}"):
            publish(engine, 1)
        assert engine.version == 0


# Restarts, freezes, kills -------------------------------------------------------------------------


@pytest.mark.fault("corrupted data", "generate")
def test_a_server_that_restarted_unseen_is_not_believed(one: Server):
    with connected(one, health_interval_s=1000.0, recover_s=0.5) as engine:
        publish(engine, 5, reset=True)
        one.do(reset={})
        with pytest.raises(EngineError, match=r"under version 'default' and not under 5 to 5"):
            generate(engine, request())
        assert engine.num_generated == 0 and engine.num_serving == 0


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_restarted_before_a_publish_is_given_all_weights(one: Server):
    with connected(one, health_interval_s=1000.0) as engine:
        engine.pause()
        engine.update_weights(weights(1.0, "a", "b"), 0, reset=True)
        engine.resume()
        one.do(reset={})
        engine.pause()
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
        assert one.do()["weights"] == {"a": 1.0, "b": 2.0}
        assert [s.version for s in generate(engine, request())] == [1]


@pytest.mark.fault("hang", "generate")
def test_a_frozen_server_loses_its_requests_and_returns_at_the_present_version(fresh: list[Server]):
    well, ill = fresh
    for server in fresh:
        server.do(held=True)
    with connected(*fresh, health_timeout_s=1.5) as engine:
        engine.pause()
        engine.update_weights(weights(1.0, "a", "b"), 0, reset=True)
        engine.resume()
        sending = Sending(engine, [request() for _ in range(8)])
        for server in fresh:
            server.wait(running=4)
        ill.signal(signal.SIGSTOP)
        well.wait(running=8)  # all of them
        well.do(held=False)
        assert sending.join() == ["length"] * 8
        assert engine.num_generated == 32
        engine.pause()
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
        assert engine.num_serving == 1
        ill.signal(signal.SIGCONT)
        ill.do(held=False)
        is_back(engine, well, 2)
        state = ill.do()
        assert state["version"] == "1" and state["weights"] == {"a": 1.0, "b": 2.0}
        assert not state["paused"] and not state["dead"]


def finish(executor: Any, server: Server, first: int, last: int) -> list[Any]:
    """Train from version ``first`` to ``last``."""
    groups: list[Any] = []
    for version in range(first, last + 1):
        batch = executor.take()
        groups += batch
        executor.publish(weights(float(version)), version)
    return groups


@pytest.mark.parametrize("again", [False, True], ids=["it stays away", "it comes back"])
@pytest.mark.fault("process killed", "generate")
def test_a_server_killed_while_generating_costs_nothing(fresh: list[Server], again: bool):
    well, ill = fresh
    for server in fresh:
        server.do(held=True)
    engine = make_engine(*fresh)
    engine.start()
    workflow = Samples(group_size=2, max_new_tokens=6)
    with rolling(engine, workflow, batch_size=4, max_head_lag=1, rows=8, num_epochs=1) as executor:
        for server in fresh:
            server.wait(running=4)
            server.do(step=2, wait={"stalled": True})
        ill.kill()
        well.do(held=False, wait={})
        if again:
            ill.restart()
        groups = finish(executor, well, 1, 2)
        assert executor.take() is None
        assert sorted(g.row_id for g in groups) == sorted(f"row{n}" for n in range(8))
        assert_exact(groups, 6)
        if again:
            is_back(engine, well, 2)
            assert ill.do()["version"] == "2"
        else:
            assert engine.num_serving == 1
    assert_nothing_left()


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/weight_info", "/resume"])
@pytest.mark.fault("process killed", "publish")
def test_a_server_killed_in_a_publish_costs_nothing(fresh: list[Server], path: str):
    well, ill = fresh
    engine = make_engine(*fresh)
    engine.start()
    with rolling(engine, batch_size=4, max_head_lag=1, rows=12, num_epochs=1) as executor:
        groups = finish(executor, well, 1, 1)
        ill.fault(path, "hang")
        killer = KillWhen(ill, path)
        groups += finish(executor, well, 2, 3)
        killer.join()
        assert executor.take() is None
        assert sorted(g.row_id for g in groups) == sorted(f"row{n}" for n in range(12))
        assert_exact(groups, 4)
        assert engine.num_serving == 1 and well.do()["version"] == "3"
    assert_nothing_left()


class KillWhen:
    """Kills a server when it is next asked for ``path``."""

    def __init__(self, server: Server, path: str) -> None:
        count = server.do()["received"].get(path, 0)

        def work() -> None:
            server.do(wait={path: count + 1})
            server.kill()

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60.0)


@pytest.mark.fault("process killed", "generate")
def test_the_last_server_killed_is_a_named_error_in_the_trainer():
    with servers(1, "--held") as [server]:
        engine = make_engine(server, recover_s=0.5)
        engine.start()
        with rolling(engine, batch_size=2) as executor:
            server.wait(running=6)
            server.kill()
            with pytest.raises(RolloutError, match=r"no server has been left for 0.5 s"):
                executor.take()
    assert_nothing_left()


@pytest.mark.fault("process killed", "publish")
def test_the_last_server_killed_in_a_publish_is_a_named_error():
    with servers(1) as [server]:
        engine = make_engine(server, recover_s=0.5)
        engine.start()
        with rolling(engine, batch_size=2, max_head_lag=0) as executor:
            wait_until(executor, lambda: executor.stat.pending == 2)
            executor.take()
            server.kill()
            with pytest.raises(EngineError, match=rf"{server.url}"):
                executor.publish(weights(1.0), 1)
    assert_nothing_left()


# The client ---------------------------------------------------------------------------------------


class Odd(Exception):
    pass


@pytest.mark.fault("thread died", "publish")
def test_a_watcher_that_dies_is_an_error_and_not_a_silence(one: Server):
    class Backend(VLLMBackend):
        calls = 0

        def health(self) -> Call:
            self.calls += 1
            if self.calls > 1:
                raise Odd("no health")
            return super().health()

    engine = RemoteInfEngine([one.url], Backend(), options=RemoteOptions(**QUICK))
    engine.start()
    while engine._running().error is None:
        one.do()
    with pytest.raises(
        EngineError, match=r"the health checks of the servers failed: Odd\('no health'\)"
    ):
        engine.pause()
    engine.close()
    assert_nothing_left()


def with_client(work: Callable[[HttpClient], Any]) -> Any:
    client = HttpClient()
    client.start()
    client.start()
    try:
        return work(client)
    finally:
        client.close()
        assert_nothing_left()


def test_work_that_takes_too_long_is_cancelled():
    def work(client: HttpClient) -> None:
        with pytest.raises(EngineError, match=r"no answer from the servers within 0.1 s"):
            client.run(asyncio.sleep(1000.0), 0.1)

    with_client(work)


def test_work_that_times_out_itself_raises_that():
    async def late() -> None:
        raise TimeoutError("mine")

    def work(client: HttpClient) -> None:
        with pytest.raises(TimeoutError, match="mine"):
            client.run(late(), 30.0)

    with_client(work)


@pytest.mark.fault("hang", "teardown")
def test_a_call_that_waits_when_the_client_closes_is_told():
    results: list[BaseException] = []

    def work(client: HttpClient) -> None:
        def wait() -> None:
            try:
                client.run(asyncio.sleep(1000.0), 1000.0)
            except EngineError as error:
                results.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        client.run(asyncio.sleep(0.01), 30.0)
        client.close()
        thread.join(30.0)

    with_client(work)
    assert "closed" in str(results[0])


class Closing(socketserver.ThreadingTCPServer):
    """Answers the first request of some connections, and closes them at the second one, unread."""

    def __init__(self, num_kept: int) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.num_kept, self.connections = num_kept, 0

    class Handler(socketserver.StreamRequestHandler):
        server: Closing

        def handle(self) -> None:
            self.server.connections += 1
            if self.server.connections <= self.server.num_kept:
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                self.rfile.read(1)


@pytest.mark.parametrize("num_kept", [1, 2])
def test_a_call_on_a_connection_that_the_server_closes_just_then_is_sent_once_more(num_kept: int):
    def two_calls(client: HttpClient) -> None:
        def call() -> Any:
            return client.run(client.request(server.url, Call("POST", "/pause"), timeout_s=20), 30)

        assert call() == {}
        if num_kept == 2:
            assert call() == {}
        else:  # it is closed again
            with pytest.raises(ServerError, match=f"{server.url}/pause: ") as caught:
                call()
            assert caught.value.status is None

    with Closing(num_kept) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with_client(two_calls)
        finally:
            server.shutdown()
            thread.join()
    assert server.connections == 2


def test_names_are_looked_up_and_no_thread_of_that_is_left(one: Server):
    def work(client: HttpClient) -> Any:
        url = f"http://localhost:{one.port}"
        return client.run(client.request(url, Call("GET", "/is_paused"), timeout_s=20.0), 30.0)

    assert with_client(work) == {"is_paused": False}
    assert not [t.name for t in threading.enumerate() if t.name.startswith("asyncio_")]


def test_a_server_that_is_not_there_is_named():
    def work(client: HttpClient) -> None:
        call = Call("GET", "/health")
        with pytest.raises(ServerError, match=r"http://127.0.0.1:9/health: ") as caught:
            client.run(client.request("http://127.0.0.1:9", call, timeout_s=20.0), 30.0)
        assert caught.value.status is None and not caught.value.is_refusal

    with_client(work)
