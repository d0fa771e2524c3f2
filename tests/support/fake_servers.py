"""Fake vLLM processes for tests, and engines on them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from sdp_lightning.engines.remote.backend import RemoteInfBackend
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from support.paths import SUPPORT

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
QUICK: dict[str, Any] = {
    "health_interval_s": 0.05,
    "health_timeout_s": 20.0,
    "answer_timeout_s": 20.0,
    "control_timeout_s": 20.0,
    "request_timeout_s": 60.0,
    "recover_s": 30.0,
    "settle_s": 0.01,
    "abort_grace_s": 0.2,
}
SHORT: dict[str, Any] = {
    "health_timeout_s": 1.0,
    "answer_timeout_s": 1.0,
    "control_timeout_s": 1.0,
    "request_timeout_s": 0.5,
}


def limits(kind: str, *, recover_s: float = 1.0) -> dict[str, Any]:
    """Deadlines that are short only where one is to pass, so that a slow machine passes none."""
    if kind == "hang":  # each try has twice the time of the one before
        return SHORT | {"recover_s": recover_s, "max_tries": 2}
    return {"recover_s": recover_s, "max_tries": 3}


S = TypeVar("S", bound="Server")


class Server:
    """A fake vLLM in a process of its own."""

    script = "fake_vllm.py"
    backend: type[RemoteInfBackend] = VLLMBackend

    def __init__(self, *arguments: str) -> None:
        self.arguments, self.port = arguments, 0
        self.start()

    @property
    def url(self) -> str:
        scheme = "https" if "--certificate" in self.arguments else "http"
        return f"{scheme}://{self.host}"

    @property
    def host(self) -> str:
        return f"{'[::1]' if '::1' in self.arguments else '127.0.0.1'}:{self.port}"

    def start(self) -> None:
        script = str(SUPPORT / self.script)
        command = [sys.executable, script, "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line and line[0] == "ready", "the fake server did not start"
        self.port = int(line[1])

    def do(self, **what: Any) -> dict[str, Any]:
        """Tell it; returns its state. ``wait={...}`` returns when the state has those values."""
        body = json.dumps(what).encode()
        request = urllib.request.Request(f"{self.url}/fake/do", body, method="POST")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=70.0) as answer:
            return json.loads(answer.read())

    def wait(self, **values: Any) -> dict[str, Any]:
        return self.do(wait=values)

    def fault(self, path: str, kind: str, times: int = 10**9, *, after: int = 0) -> None:
        """``after`` so many chunks, of a fault in a stream."""
        self.do(faults=[{"path": path, "kind": kind, "times": times, "after": after}])

    def answer(
        self, path: str, body: bytes = b"", status: int = 200, times: int = 10**9, **headers: str
    ) -> None:
        """Answer ``path`` with ``body``; ``Retry_After=`` names a header."""
        fault = {"path": path, "kind": "answer", "times": times, "status": status}
        fault["headers"] = {name.replace("_", "-"): value for name, value in headers.items()}
        self.do(faults=[fault | {"body": base64.b64encode(body).decode()}])

    def alter(self, path: str, values: dict[str, Any]) -> None:
        """Give the true answer with other ``values``, each at its path."""
        fault = {"path": path, "kind": "alter", "values": values}
        self.do(faults=[fault])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30.0)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def restart(self) -> None:
        """Again on its port, as it was at first."""
        self.stop()
        self.start()


@contextmanager
def servers(count: int, *arguments: str, kind: type[S] = Server) -> Iterator[list[S]]:
    running = [kind(*arguments) for _ in range(count)]
    try:
        yield running
    finally:
        for server in running:
            server.stop()


def make_engine(*running: Server, **options: Any) -> RemoteInfEngine:
    settings = RemoteOptions(**(QUICK | options))
    backend = running[0].backend()
    return RemoteInfEngine([server.url for server in running], backend, options=settings)


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


def assert_nothing_left() -> None:
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if name.startswith(("sdp-http", "sdp-tcp"))]
    assert not list(Path("/dev/shm").glob(f"sdp-weights-{os.getpid()}-*"))


def weights(value: float, *names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full((2,), value)) for name in names or ("a", "b")]


def is_back(engine: RemoteInfEngine, server: Server, count: int = 1) -> None:
    """Wait until ``count`` servers serve; ``server`` is asked meanwhile, so nothing spins."""
    deadline = time.monotonic() + 100.0
    while time.monotonic() < deadline:
        if engine.num_serving == count:
            return
        server.do()
    raise AssertionError(f"{engine.num_serving} servers serve, and not {count}")
