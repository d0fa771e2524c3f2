"""A server process that answers as vLLM 0.32 does, without a model, and fails on demand.

``python tests/support/fake_vllm.py --port 0`` prints ``ready PORT``. The token at position p is
p % 7 + 3 and its log-prob -(version + 1) / 10, so a wrong stamp shows in the numbers; an echo gives
a token of the prompt that less token / 1000. What vLLM forbids kills it here too: loading under
running requests, generating after a failed load, and sampling with an adapter whose folder is gone.

Routes under ``/fake`` are for tests: ``/fake/do`` sets faults, holds tokens back, waits for events.
A fault is ``{"path", "kind", "times"}``; those of a stream come ``"after"`` so many chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from support.vllm_forms import (
    COMPLETIONS,
    DEAD,
    GENERATE,
    NO_SCALE_OUT,
    Running,
    error,
    event,
    prompt_entry,
    read_first_values,
    told_error,
)

VOCABULARY, MODEL, MAX_LORA_RANK = 256, "m", 8


Send = Callable[[Running], Awaitable[None]]


class Broken(Exception):
    """A stream is to break off here."""


class FakeVLLM:
    """State of the server. Everything happens in one event loop."""

    guarded = ("/v1", "/inference")  # routes that ask for the key; vLLM's others are open

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
        given = vars(self.options) | settings
        self.no_scale_out = bool(given.get("no_scale_out", False))
        self.num_workers = int(given.get("num_workers", 1))
        self.adapters: dict[str, dict[str, Any]] = {}
        self.receiving = 0
        self.faults: list[dict[str, Any]] = []
        self.running: list[Running] = []
        self.received: Counter[str] = Counter()
        self.callers: set[Any] = set()  # addresses: one a connection
        self.loads: list[list[str]] = []
        self.weights: dict[str, float] = {}
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
        method, arguments = body["method"], body["kwargs"]
        if method == "sdp_hello" and not self.dead:
            return web.json_response({"results": [True] * self.num_workers})
        if method not in ("sdp_load_folder", "sdp_receive") or self.dead:
            return error(500, DEAD if self.dead else f"no method {method}")
        if self.running and not self.paused:
            self.dead = True  # weights changed under running requests
            return error(500, DEAD)
        if self.take_fault("/collective_rpc", "load"):
            self.bad_load = True
            return error(500, "Worker failed with error 'cannot find any safetensors'")
        if method == "sdp_receive":
            return await self.receive(arguments)
        files = sorted(Path(arguments["folder"]).glob("*.safetensors"))
        if not files:
            self.bad_load = True
            return error(500, f"cannot find any safetensors in {arguments['folder']}")
        self.take_in([read_first_values(file) for file in files])
        return web.json_response({"results": [None] * self.num_workers})

    def take_in(self, files: list[dict[str, float]]) -> None:
        for loaded in files:
            self.weights |= loaded
            self.loads.append(sorted(loaded))
        self.bad_load = False

    async def receive(self, arguments: dict[str, Any]) -> web.Response:
        """As the workers do; a fault "stall" stops one of them after the first tensor."""
        from sdp_lightning.errors import EngineError
        from sdp_lightning.weights.gloo import receive
        from sdp_lightning.weights.protocol import Receive

        what, loop = Receive(**arguments), asyncio.get_running_loop()
        stalls = self.take_fault("/collective_rpc", "stall")

        def work(worker: int) -> dict[str, float]:
            loaded: dict[str, float] = {}
            for name, tensor in receive(what, worker):
                loaded[name] = float(tensor.flatten()[0])
                if stalls:
                    asyncio.run_coroutine_threadsafe(self.note_receiving(), loop).result()
                    threading.Event().wait()
            return loaded

        workers = [asyncio.to_thread(work, number) for number in range(self.num_workers)]
        try:
            loaded = await asyncio.gather(*workers)
        except EngineError as found:
            return error(500, f"Worker failed with error '{found}'")
        assert all(one == loaded[0] for one in loaded)
        self.take_in([loaded[0]])
        return web.json_response({"results": [None] * self.num_workers})

    async def note_receiving(self) -> None:
        self.receiving += 1
        await self.notify()

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body.get("load_inplace"):
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the "
            message += "adapter in place, set 'load_inplace' to True."
            return error(400, message, "InvalidUserInput")
        if not (folder / "adapter_config.json").exists():
            message = f"Loading lora {name} failed: No adapter found for {folder}"
            return error(404, message, "NotFoundError")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > MAX_LORA_RANK:
            message = f"LoRA rank {rank} is greater than max_lora_rank {MAX_LORA_RANK}."
            return error(
                500, f"Call to add_lora method failed: Worker failed with error '{message}"
            )
        values = read_first_values(folder / "adapter_model.safetensors")
        self.adapters[name] = {"folder": str(folder), "weights": values}
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

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
            if self.paused or len(running.tokens) >= running.allowed:
                await self.wait_change()
                continue
            at = len(running.tokens)
            if not running.spans or running.spans[-1]["version"] != self.version:
                running.spans.append({"version": self.version, "start": at, "end": at})
            running.spans[-1]["end"] = at + 1
            running.tokens.append((running.start + at) % 7 + 3)
            running.logprobs.append(self.logprob)
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
        kind = self.take_fault(
            path, "500", "404", "hang", "disconnect", "garbage", "odd", "bytes", "truncated"
        )
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
                web.get("/get_world_size", self.world_size),
                web.get("/health", self.health),
                web.get("/weight_info", self.weight_info),
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
    parser.add_argument("--no-scale-out", action="store_true")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--api-key", default="")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
