"""A server process that answers as vLLM 0.32 does, without a model, and fails on demand.

``python tests/fake_vllm.py --port 0`` prints ``ready PORT``. The token at position p is p % 7 + 3
and its log-prob -(version + 1) / 10, so a wrong stamp shows in the numbers. What vLLM forbids kills
it here too: loading under running requests, and generating after a failed load.

Routes under ``/fake`` are for tests: ``/fake/do`` sets faults, holds tokens back, waits for events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

GENERATE = "/inference/v1/generate"
VOCABULARY = 256
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(eq=False)
class Running:
    """A request that is being sampled."""

    start: int
    budget: int
    allowed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False


class FakeVLLM:
    """State of the server. Everything happens in one event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.changed = asyncio.Event()
        self.reset({})

    def reset(self, settings: dict[str, Any]) -> None:
        """As if it had just been started."""
        self.version, self.paused, self.clear_cache = "default", False, ""
        self.dead = self.bad_load = False
        self.held = bool(settings.get("held", self.options.held))
        self.reply_s = float(settings.get("reply_s", self.options.reply_s))
        self.raw_logprobs = bool(settings.get("raw_logprobs", self.options.raw_logprobs))
        self.max_length = int(settings.get("max_length", 4096))
        self.faults: list[dict[str, Any]] = []
        self.running: list[Running] = []
        self.received: Counter[str] = Counter()
        self.loads: list[list[str]] = []
        self.weights: dict[str, float] = {}
        self.seen: list[dict[str, Any]] = []

    # What vLLM has ----------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        served = {"id": "m", "object": "model", "created": 1795396941, "owned_by": "vllm"}
        served |= {"root": "/tmp/tinyvllm", "parent": None, "max_model_len": self.max_length}
        return web.json_response({"object": "list", "data": [served]})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def weight_info(self, request: web.Request) -> web.Response:
        wrong = self.take_fault("/weight_info", "wrong")
        return web.json_response({"weight_version": "41" if wrong else self.version})

    async def set_version(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not isinstance(body.get("new_version"), str):
            return error(400, "1 validation error", "Bad Request", "body.new_version")
        if not self.take_fault("/update_weight_version", "ignored"):
            self.version = body["new_version"]
        return web.json_response({"success": True, "new_version": body["new_version"]})

    async def pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        self.clear_cache = request.query.get("clear_cache", "true")
        self.paused = True
        if mode == "abort":
            for running in self.running:
                running.aborted = True
        await self.notify()
        return web.json_response({"status": "paused"})

    async def resume(self, request: web.Request) -> web.Response:
        self.paused = False
        await self.notify()
        return web.json_response({"status": "resumed"})

    async def is_paused(self, request: web.Request) -> web.Response:
        return web.json_response({"is_paused": self.paused})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] != "sdp_load_folder" or self.dead:
            return error(500, DEAD if self.dead else f"no method {body['method']}")
        if self.running and not self.paused:
            self.dead = True  # weights changed under running requests
            return error(500, DEAD)
        files = sorted(Path(body["kwargs"]["folder"]).glob("*.safetensors"))
        if not files or self.take_fault("/collective_rpc", "load"):
            self.bad_load = True
            return error(500, f"cannot find any safetensors in {body['kwargs']['folder']}")
        for file in files:
            loaded = read_first_values(file)
            self.weights |= loaded
            self.loads.append(sorted(loaded))
        self.bad_load = False
        return web.json_response({"results": [None]})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens, params = body["token_ids"], body["sampling_params"]
        if bad := [token for token in tokens if not 0 <= token < VOCABULARY]:
            message = f"Token id {bad[0]} is out of vocabulary"
            return error(400, message, "BadRequestError")
        if self.bad_load:
            self.dead = True
        if self.dead:
            return error(500, DEAD)
        if params["logprobs"]:
            return web.json_response(self.probe_answer(params))
        self.seen.append(body)
        running = Running(
            len(tokens), params["max_tokens"], 0 if self.held else params["max_tokens"]
        )
        while self.paused:  # requests that come during a pause wait, and then run
            await self.wait_change()
        self.running.append(running)
        await self.notify()
        try:
            await self.sample(running)
        finally:
            self.running = [other for other in self.running if other is not running]
            await self.notify()
        return web.json_response(self.answer(running))

    async def sample(self, running: Running) -> None:
        if self.reply_s:
            await asyncio.sleep(self.reply_s)
        while len(running.tokens) < running.budget and not running.aborted:
            if self.paused or len(running.tokens) >= running.allowed:
                await self.wait_change()
                continue
            at = len(running.tokens)
            if not running.spans or running.spans[-1]["version"] != self.version:
                running.spans.append({"version": self.version, "start": at, "end": at})
            running.spans[-1]["end"] = at + 1
            running.tokens.append((running.start + at) % 7 + 3)
            number = int(self.version) if self.version.isdigit() else 98
            running.logprobs.append(-(number + 1) / 10)

    def answer(self, running: Running) -> dict[str, Any]:
        content = [entry(t, v) for t, v in zip(running.tokens, running.logprobs, strict=True)]
        done = len(running.tokens)
        choice = {
            "index": 0,
            "finish_reason": "abort" if running.aborted else "length",
            "stop_reason": None,
            "token_ids": running.tokens,
            "weight_versions": running.spans,
            "logprobs": {"content": content},
        }
        usage = {
            "prompt_tokens": running.start,
            "total_tokens": running.start + done,
            "completion_tokens": done,
        }
        return {
            "request_id": f"generate-tokens-{self.received[GENERATE]}",
            "model": "m",
            "created": int(time.time()),
            "usage": usage,
            "output_mode": "tokens",
            "choices": [choice],
        }

    def probe_answer(self, params: dict[str, Any]) -> dict[str, Any]:
        heat = 1.0 if self.raw_logprobs else params["temperature"]
        scores = [-token / 10 / heat for token in range(int(params["logprobs"]))]
        total = math.log(sum(math.exp(score) for score in scores))
        top = [entry(token, score - total) for token, score in enumerate(scores)]
        running = Running(2, 1, 1, [0], [top[0]["logprob"]])
        running.spans = [{"version": self.version, "start": 0, "end": 1}]
        answer = self.answer(running)
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return answer

    # Faults -----------------------------------------------------------------------------------

    def take_fault(self, path: str, *kinds: str) -> str | None:
        for fault in self.faults:
            if fault["path"] == path and fault["kind"] in kinds and fault["times"] > 0:
                fault["times"] -= 1
                return str(fault["kind"])
        return None

    @web.middleware
    async def disturb(self, request: web.Request, handler: Any) -> web.StreamResponse:
        path = request.path
        if path.startswith("/fake"):
            return await handler(request)
        self.received[path] += 1
        await self.notify()
        key = self.options.api_key
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        kind = self.take_fault(
            path, "500", "hang", "disconnect", "garbage", "odd", "bytes", "truncated"
        )
        if kind == "500":
            return error(500, DEAD)
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "disconnect":
            assert request.transport is not None
            request.transport.abort()
        if kind == "garbage":
            return web.Response(text="<html>gateway</html>")
        if kind == "bytes":
            return web.Response(body=b'{"\xff\xfe')
        if kind == "odd":
            return web.json_response({"choices": [], "data": [], "object": "list"})
        answer = await handler(request)
        if kind == "truncated":
            return await self.truncate(request, answer)
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

    def state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "paused": self.paused,
            "clear_cache": self.clear_cache,
            "dead": self.dead,
            "running": len(self.running),
            "stalled": all(len(r.tokens) >= r.allowed for r in self.running),
            "received": dict(self.received),
            "loads": self.loads,
            "weights": self.weights,
            "seen": self.seen,
        }

    async def notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def wait_change(self, timeout_s: float | None = None) -> None:
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_s)
        except TimeoutError:
            return

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.disturb], client_max_size=2**26)
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/weight_info", self.weight_info),
                web.get("/is_paused", self.is_paused),
                web.post("/update_weight_version", self.set_version),
                web.post("/pause", self.pause),
                web.post("/resume", self.resume),
                web.post("/collective_rpc", self.collective_rpc),
                web.post(GENERATE, self.generate),
                web.post("/fake/do", self.do),
            ]
        )
        return app


def entry(token: int, logprob: float) -> dict[str, Any]:
    alone = {"token_id": token, "logprob": logprob, "rank": 1}
    return alone | {"top_logprobs": [dict(alone)]}


def error(status: int, message: str, kind: str = "InternalServerError", param: Any = None) -> Any:
    told = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": told}, status=status)


def read_first_values(file: Path) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        names = list(tensors.keys())
        return {name: float(tensors.get_tensor(name).flat[0]) for name in names}


async def serve(options: argparse.Namespace) -> None:
    fake = FakeVLLM(options)
    fake.faults = [{"times": 10**9} | fault for fault in json.loads(options.faults)]
    runner = web.AppRunner(fake.app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port)
    await site.start()
    print("ready", runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)  # the parent's death ends it
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", default="[]", help='JSON: [{"path":..,"kind":..,"times":..}]')
    parser.add_argument("--held", action="store_true", help="sample nothing until a step")
    parser.add_argument("--reply-s", type=float, default=0.0, help="before the first token")
    parser.add_argument("--raw-logprobs", action="store_true")
    parser.add_argument("--api-key", default="")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
