"""What the fake servers have in common: faults on demand, and a route by which tests steer them.

A fault is ``{"path", "kind", "times"}``. Those of a stream come ``"after"`` so many chunks;
``"answer"`` has the ``"status"``, ``"headers"`` and base64 ``"body"`` to send; ``"alter"`` sends
the true answer with other ``"values"``, each at a path such as ``choices.0.token_ids.1``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import ssl
import sys
import time
from collections import Counter
from typing import Any

from aiohttp import web

from support.vllm_forms import DEAD, error

KINDS = ("500", "404", "hang", "disconnect", "garbage", "odd", "deep", "truncated")
KINDS += ("answer", "alter")


class FaultyServer:
    """State that tests read and set. Everything happens in one event loop."""

    guarded: tuple[str, ...] = ()  # routes that ask for the key

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.changed = asyncio.Event()
        self.running: list[Any] = []
        self.reset({})

    def reset(self, settings: dict[str, Any]) -> None:
        """As if it had just been started."""
        self.faults: list[dict[str, Any]] = []
        self.received: Counter[str] = Counter()
        self.callers: set[Any] = set()  # addresses: one a connection

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def app(self) -> web.Application:
        raise NotImplementedError

    # Faults -----------------------------------------------------------------------------------

    def take_fault(self, path: str, *kinds: str) -> str | None:
        found = self.find_fault(path, *kinds)
        return None if found is None else str(found["kind"])

    def find_fault(self, path: str, *kinds: str) -> dict[str, Any] | None:
        for fault in self.faults:
            if fault["path"] == path and fault["kind"] in kinds and fault["times"] > 0:
                fault["times"] -= 1
                return fault
        return None

    @web.middleware
    async def disturb(self, request: web.Request, handler: Any) -> web.StreamResponse:
        path = request.path
        if path.startswith("/fake"):
            return await handler(request)
        self.received[path] += 1
        assert request.transport is not None
        self.callers.add(request.transport.get_extra_info("peername"))
        await self.notify()
        key = self.options.api_key
        guarded = path.startswith(self.guarded)
        if key and guarded and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        fault = self.find_fault(path, *KINDS)
        kind = None if fault is None else fault["kind"]
        if kind == "500":
            return error(500, DEAD)
        if kind == "404":
            return web.json_response({"detail": "Not Found"}, status=404)
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "disconnect":
            assert request.transport is not None
            request.transport.abort()
        if kind == "garbage":
            return web.Response(text="<html>gateway</html>")
        if kind == "deep":
            return web.Response(body=b"[" * 200_000)
        if kind == "odd":
            return web.json_response({"choices": [], "data": [], "object": "list"})
        if kind == "answer":
            body, headers = base64.b64decode(fault["body"]), fault["headers"]
            return web.Response(body=body, status=fault["status"], headers=headers)
        answer = await handler(request)
        if kind == "truncated":
            return await self.truncate(request, answer)
        if kind == "alter":
            return web.json_response(alter(json.loads(answer.body), fault["values"]))
        return answer

    async def truncate(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        body = bytes(answer.body) if isinstance(answer.body, bytes) else b"{}"
        cut = web.StreamResponse(headers={"Content-Length": str(len(body) + 10)})
        await cut.prepare(request)
        await cut.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.close()
        return cut

    # For tests --------------------------------------------------------------------------------

    async def do(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "reset" in body:
            self.reset(body["reset"])
        if "faults" in body:
            self.faults = [{"times": 10**9} | fault for fault in body["faults"]]
        if "held" in body:
            self.held = body["held"]
            for running in self.running:
                running.allowed = running.budget
        for running in self.running:
            running.allowed += body.get("step", 0)
        await self.notify()
        if "wait" in body:
            deadline = time.monotonic() + 60.0
            while not self.has_happened(body["wait"]):
                if time.monotonic() > deadline:
                    return web.json_response({"state": self.state()}, status=504)
                await self.wait_change(1.0)
        return web.json_response(self.state())

    def has_happened(self, wanted: dict[str, Any]) -> bool:
        state = self.state()
        return all(
            state["received"].get(name, 0) >= value
            if name.startswith("/")
            else state[name] == value
            for name, value in wanted.items()
        )

    async def notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def wait_change(self, timeout_s: float | None = None) -> None:
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_s)
        except TimeoutError:
            return


def alter(answer: Any, values: dict[str, Any]) -> Any:
    """``answer`` with each value at its path."""
    for path, value in values.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        place = answer
        for key in parents:
            place = place[key]
        place[last] = value
    return answer


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--held", action="store_true", help="sample nothing until a step")
    parser.add_argument("--reply-s", type=float, default=0.0, help="before the first token")
    parser.add_argument("--raw-logprobs", action="store_true")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--certificate", help="PEM file of a certificate and its key: speak https")
    return parser


async def serve(fake: FaultyServer) -> None:
    """Serve until the parent ends."""
    tls, certificate = None, fake.options.certificate
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
    runner = web.AppRunner(fake.app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, fake.options.host, fake.options.port, ssl_context=tls)
    await site.start()
    print("ready", runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)  # the parent's death ends it
    await runner.cleanup()
