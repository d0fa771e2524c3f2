"""A server in a thread that answers every request with given bytes, right or wrong."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from sdp_lightning.engines.remote.backend import Chunk, Completion
from sdp_lightning.engines.remote.http_client import HttpClient
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.engines.remote.server_client import ServerClient
from support.remote_engines import request
from support.vllm_answers import BACKEND, INFO


class RawServer(socketserver.ThreadingTCPServer):
    """Sends ``answer`` to whoever has sent a request, and closes the connection."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answer = b""
        self.num_requests, self.request = 0, b""  # lines of the latest request's head

    class Handler(socketserver.StreamRequestHandler):
        server: RawServer

        def handle(self) -> None:
            length, self.server.request = 0, b""
            while line := self.rfile.readline().strip():
                self.server.request += line
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            self.rfile.read(length)
            self.server.num_requests += 1
            try:
                self.wfile.write(self.server.answer)
            except OSError:
                return  # the client has read enough


@contextmanager
def raw_server() -> Iterator[RawServer]:
    with RawServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def http(body: bytes | Any, *headers: str, status: str = "200 OK") -> bytes:
    """A whole answer; what is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


class Asker:
    """Asks a raw server as the engine does, without a pool: what fails is not sent again.

    ``options`` are those of the client: replace them between two calls.
    """

    def __init__(self, server: RawServer, client: HttpClient) -> None:
        self.server, self.url, self._http = server, server.url, client
        self.options = RemoteOptions(vocab_size=256)

    def complete(self, answer: bytes, *, budget: int = 4, **options: Any) -> Completion:
        """The completion that is read from ``answer``."""
        self.server.answer = answer
        client = ServerClient(self._http, BACKEND, replace(self.options, **options))
        replica, chunks = Replica(self.url, INFO), list[Chunk]()
        work = client.complete(replica, request(budget=budget), 0, chunks)
        return self._http.run(work, 30.0)

    def version(self, answer: bytes, *, timeout_s: float = 20.0) -> str:
        """The version that is read from ``answer``."""
        self.server.answer = answer
        options = replace(self.options, answer_timeout_s=timeout_s)
        client = ServerClient(self._http, BACKEND, options)
        return self._http.run(client.get_version(Replica(self.url, INFO)), 30.0)


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    """Asks a server that answers with given bytes."""
    client = HttpClient()
    client.start()
    try:
        with raw_server() as server:
            yield Asker(server, client)
    finally:
        client.close()
