"""A server process that answers as vLLM 0.32 does, without a model, and fails on demand.

``python tests/support/fake_vllm.py --port 0`` prints ``ready PORT``. The token at position p is
p % 7 + 3 and its log-prob -(version + 1) / 10, so a wrong stamp shows in the numbers; an echo gives
a token of the prompt that less token / 1000. What vLLM forbids kills it here too: loading under
running requests, generating after a failed load, and sampling with an adapter whose folder is gone.

Routes under ``/fake`` are for tests: ``/fake/do`` sets faults, holds tokens back, waits for events.
A fault is ``{"path", "kind", "times"}``; those of a stream come ``"after"`` so many chunks.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from support.fake_weights import FakeWeights
from support.server_faults import make_parser, serve
from support.vllm_forms import (
    COMPLETIONS,
    DEAD,
    GENERATE,
    NO_SCALE_OUT,
    Running,
    error,
    event,
    prompt_entry,
    told_error,
)

VOCABULARY, MODEL = 256, "m"


Send = Callable[[Running], Awaitable[None]]


class Broken(Exception):
    """A stream is to break off here."""


class FakeVLLM(FakeWeights):
    """State of the server. Everything happens in one event loop."""

    guarded = ("/v1", "/inference")  # routes that ask for the key; vLLM's others are open

    def reset(self, settings: dict[str, Any]) -> None:
        """As if it had just been started."""
        super().reset(settings)
        self.version, self.clear_cache = "default", ""
        self.held = bool(settings.get("held", self.options.held))
        self.reply_s = float(settings.get("reply_s", self.options.reply_s))
        self.raw_logprobs = bool(settings.get("raw_logprobs", self.options.raw_logprobs))
        self.max_length = int(settings.get("max_length", 4096))
        given = vars(self.options) | settings
        self.no_scale_out = bool(given.get("no_scale_out", False))
        self.no_metrics, self.sampled = bool(given.get("no_metrics", False)), 0
        self.running: list[Running] = []
        self.seen: list[dict[str, Any]] = []

    # What vLLM has ----------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        served = {"id": MODEL, "object": "model", "created": 1795396941, "owned_by": "vllm"}
        served |= {"root": "/tmp/tinyvllm", "parent": None, "max_model_len": self.max_length}
        return web.json_response({"object": "list", "data": [served]})

    async def world_size(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": self.num_workers})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        if self.no_metrics:
            return web.Response(status=404)
        count = f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL}"}} {self.sampled}.0'
        return web.Response(text=f"# TYPE vllm:generation_tokens_total counter\n{count}\n")

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

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if self.no_scale_out:
            return error(403, NO_SCALE_OUT, "PermissionDeniedError")
        body = await request.json()
        return await self.respond(request, body, body["token_ids"], body["sampling_params"])

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["return_token_ids"]
        return await self.respond(request, body, body["prompt"], body)

    async def respond(
        self, request: web.Request, body: dict[str, Any], prompt: list[int], params: dict[str, Any]
    ) -> web.StreamResponse:
        model, streamed = body.get("model", MODEL), body.get("stream", False)
        if model not in {MODEL, *self.adapters}:
            message = f"The model `{model}` does not exist. Valid aliases: {MODEL}."
            return error(404, message, "NotFoundError", "model")
        if bad := [token for token in prompt if not 0 <= token < VOCABULARY]:
            message, kind = f"Token id {bad[0]} is out of vocabulary", "BadRequestError"
            if not streamed:
                return error(400, message, kind)
            return await self.stream(request, model, refusal=told_error(400, message, kind))
        gone = model in self.adapters and not Path(self.adapters[model]["folder"]).exists()
        self.dead = self.dead or self.bad_load or gone
        if self.dead:
            return error(500, DEAD)
        number, text = self.received[request.path], request.path == COMPLETIONS
        while self.paused:  # requests that come during a pause wait, and then run
            await self.wait_change()
        if params.get("logprobs"):
            return web.json_response(self.probe_answer(params, text=text))
        if params.get("prompt_logprobs") is not None:
            return web.json_response(self.echo_answer(prompt, text=text).answer(number, model))
        self.seen.append(body)
        budget = params["max_tokens"]
        running = Running(len(prompt), budget, 0 if self.held else budget, text=text)
        running.interval = params.get("stream_interval", 1)
        running.stops = tuple(params.get("stop") or ())
        self.running.append(running)
        await self.notify()
        try:
            if streamed:
                return await self.stream(request, model, running)
            await self.sample(running)
        finally:
            self.running = [other for other in self.running if other is not running]
            await self.notify()
        return web.json_response(running.answer(number, model))

    async def stream(
        self,
        request: web.Request,
        model: str,
        running: Running | None = None,
        *,
        refusal: dict[str, Any] | None = None,
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        fault = self.find_fault(request.path, "cut", "unfinished", "error") or {"after": 10**9}
        number = self.received[request.path]
        await answer.prepare(request)

        async def send(running: Running, *, last: bool = False) -> None:
            if running.chunks >= fault.get("after", 0):
                raise Broken
            await answer.write(event(running.next_chunk(number, model, last=last)))
            await self.notify()

        try:
            if running is not None:
                await self.sample(running, send)
                await send(running, last=True)
        except Broken:
            if fault["kind"] == "cut":
                assert request.transport is not None
                request.transport.abort()
            if fault["kind"] != "error":
                return answer
            refusal = told_error(500, DEAD, "InternalServerError")
        if refusal is not None:
            await answer.write(event(refusal))
        await answer.write(event("[DONE]"))
        return answer

    async def sample(self, running: Running, send: Send | None = None) -> None:
        if self.reply_s:
            await asyncio.sleep(self.reply_s)
        while len(running.tokens) < running.budget and not running.aborted:
            if running.matched is not None:
                return
            if self.paused or len(running.tokens) >= running.allowed:
                await self.wait_change()
                continue
            at = len(running.tokens)
            if not running.spans or running.spans[-1]["version"] != self.version:
                running.spans.append({"version": self.version, "start": at, "end": at})
            running.spans[-1]["end"] = at + 1
            running.add((running.start + at) % 7 + 3, self.logprob)
            self.sampled += 1
            if send is not None and running.is_due:
                await send(running)

    @property
    def logprob(self) -> float:
        number = int(self.version) if self.version.isdigit() else 98
        return -(number + 1) / 10

    def probe_answer(self, params: dict[str, Any], *, text: bool = False) -> dict[str, Any]:
        heat = 1.0 if self.raw_logprobs else params["temperature"]
        scores = [-token / 10 / heat for token in range(int(params["logprobs"]))]
        total = math.log(sum(math.exp(score) for score in scores))
        top = {token: score - total for token, score in enumerate(scores)}
        running = Running(2, 1, 1, [0], [top[0]], text=text, tops=[top])
        running.spans = [{"version": self.version, "start": 0, "end": 1}]
        return running.answer(0, MODEL)

    def echo_answer(self, prompt: list[int], *, text: bool) -> Running:
        wrong = self.take_fault(COMPLETIONS if text else GENERATE, "wrong echo")
        running = Running(len(prompt), 1, 1, [3], [self.logprob], text=text)
        running.spans = [{"version": self.version, "start": 0, "end": 1}]
        values = [self.logprob - token / 1000 - (1.0 if wrong else 0.0) for token in prompt]
        rest = [prompt_entry(t, v) for t, v in zip(prompt[1:], values[1:], strict=True)]
        running.prompt_logprobs = [None, *rest]
        return running

    # For tests --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "paused": self.paused,
            "no_scale_out": self.no_scale_out,
            "clear_cache": self.clear_cache,
            "dead": self.dead,
            "running": len(self.running),
            "stalled": all(len(r.tokens) >= r.allowed for r in self.running),
            "streamed": sum(r.sent for r in self.running),
            "receiving": self.receiving,
            "adapters": self.adapters,
            "received": dict(self.received),
            "connections": len(self.callers),
            "loads": self.loads,
            "weights": self.weights,
            "seen": self.seen,
        }

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.disturb], client_max_size=2**26)
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.get("/get_world_size", self.world_size),
                web.get("/health", self.health),
                web.get("/weight_info", self.weight_info),
                web.get("/metrics", self.metrics),
                web.get("/is_paused", self.is_paused),
                web.post("/update_weight_version", self.set_version),
                web.post("/pause", self.pause),
                web.post("/resume", self.resume),
                web.post("/collective_rpc", self.collective_rpc),
                web.post("/v1/load_lora_adapter", self.load_adapter),
                web.post(GENERATE, self.generate),
                web.post(COMPLETIONS, self.completions),
                web.post("/fake/do", self.do),
            ]
        )
        return app


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--faults", default="[]", help='JSON: [{"path":..,"kind":..,"times":..}]')
    parser.add_argument("--no-scale-out", action="store_true")
    parser.add_argument("--num-workers", type=int, default=1)
    options = parser.parse_args()
    fake = FakeVLLM(options)
    fake.faults = [{"times": 10**9} | fault for fault in json.loads(options.faults)]
    asyncio.run(serve(fake))


if __name__ == "__main__":
    main()
