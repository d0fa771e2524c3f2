"""Fake SGLang processes, and engines on them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.sglang import SGLangBackend
from support.fake_servers import QUICK, Server, assert_nothing_left


class SGLangServer(Server):
    """A fake SGLang in a process of its own."""

    script = "fake_sglang.py"

    def post(self, path: str, body: Any) -> Any:
        """As another client would."""
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), method="POST")
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=30.0) as answer:
            return json.loads(answer.read())


@contextmanager
def servers(count: int, *arguments: str) -> Iterator[list[SGLangServer]]:
    running = [SGLangServer(*arguments) for _ in range(count)]
    try:
        yield running
    finally:
        for server in running:
            server.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[SGLangServer]]:
    with servers(2) as running:
        yield running


@pytest.fixture
def two(pair: list[SGLangServer]) -> list[SGLangServer]:
    for server in pair:
        server.do(reset={}, faults=[])
    return pair


@pytest.fixture
def one(two: list[SGLangServer]) -> SGLangServer:
    return two[0]


def make_engine(*running: Server, **options: Any) -> RemoteInfEngine:
    settings = RemoteOptions(**(QUICK | options))
    return RemoteInfEngine([server.url for server in running], SGLangBackend(), options=settings)


@contextmanager
def connected(*running: Server, **options: Any) -> Iterator[RemoteInfEngine]:
    """A started engine; closed at the end, and nothing of it is left."""
    engine = make_engine(*running, **options)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
    assert_nothing_left()
