"""The HTTP client and its thread: timeouts, closing, connections that a server closes."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sdp_lightning.engines.remote.backend import Call
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.http_client import HttpClient, ServerError
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import EngineError
from support.fake_servers import (
    QUICK,
    Server,
    assert_nothing_left,
)

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
    message = r"the health checks of the servers failed: Odd\('no health'\)"
    with pytest.raises(EngineError, match=message):
        while True:
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
