"""A server process that answers as SGLang 0.5.23 does, without a model, and fails on demand.

What it samples, its faults and ``/fake/do`` are :mod:`fake_vllm`'s; the routes are SGLang's, read
from its source. As there: ``/health`` never answers while sampling is paused, a pause returns when
every request has, ``ignore_eos`` also ignores the stop tokens, a load with requests under way waits
for them, and a load that failed half-way kills what is sampled next.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from support.fake_vllm import VOCABULARY, FakeVLLM
from support.server_faults import make_parser, serve
from support.vllm_forms import Running, read_first_values

HEALTH_CHECK_TIMEOUT_S = 20.0  # SGLang's own


@dataclass(eq=False)
class Asked(Running):
    """A request, and what it asks for besides tokens."""

    stop: int | None = None
    stream: bool = False
    num_streamed: int = 0

    def obey(self, stop_token_ids: list[int]) -> None:
        """Ask for no more than what ends with one of ``stop_token_ids``."""
        for at in range(self.budget):
            if (token := (self.start + at) % 7 + 3) in stop_token_ids:
                self.budget, self.stop = at + 1, token
                return


class FakeSGLang(FakeVLLM):
    """State of the server. Everything happens in one event loop."""

    guarded = ("/",)

    def reset(self, settings: dict[str, Any]) -> None:
        super().reset(settings)
        self.model_path = "/tmp/tiny"
        self.incremental = bool(settings.get("incremental", self.options.incremental))

    def state(self) -> dict[str, Any]:
        told = [running.num_streamed for running in self.running if isinstance(running, Asked)]
        return super().state() | {"streamed": sum(told)}

    # What SGLang has --------------------------------------------------------------------------

    async def model_info(self, request: web.Request) -> web.Response:
        wrong = self.take_fault("/model_info", "wrong")
        told = {"model_path": self.model_path, "served_model_name": self.model_path}
        told |= {"tokenizer_path": "/tmp/tiny", "is_generation": True, "load_format": "auto"}
        return web.json_response(told | {"weight_version": "41" if wrong else self.version})

    async def server_info(self, request: web.Request) -> web.Response:
        if self.dead:
            return refused(500, "Internal Server Error")
        told = {"model_path": "/tmp/tiny", "tp_size": 1, "max_req_input_len": self.max_length}
        told |= {"incremental_streaming_output": self.incremental, "version": "0.5.23"}
        return web.json_response(told | {"internal_states": [{}]})

    async def health(self, request: web.Request) -> web.Response:
        if self.paused and not self.running:
            await self.wait_change(HEALTH_CHECK_TIMEOUT_S)
        return web.Response(status=503 if self.paused or self.dead else 200)

    async def pause_generation(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("mode", "abort") != "abort":
            return refused(400, f"the fake knows no mode {body['mode']}")
        self.paused = True
        while self.running:
            for running in self.running:
                running.aborted = True
            await self.notify()
            await self.wait_change()
        return web.json_response(
            {"message": "Generation paused successfully.", "status": "ok"},
        )

    async def continue_generation(self, request: web.Request) -> web.Response:
        await request.json()
        self.paused = False
        await self.notify()
        return web.json_response(
            {"message": "Generation continued successfully.", "status": "ok"},
        )

    async def update_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        while self.running and not self.paused:
            await self.wait_change()
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        if not files:
            return not_done(f"Failed to get weights iterator: {body['model_path']} has none.")
        if self.take_fault("/update_weights_from_disk", "load"):
            self.bad_load = True
            return not_done("Failed to update weights: odd.\nRolling back to original weights.")
        for file in files:
            loaded = read_first_values(file)
            self.weights |= loaded
            self.loads.append(sorted(loaded))
        self.bad_load = False
        self.clear_cache = str(body.get("flush_cache", True)).lower()
        self.model_path = body["model_path"]
        done = {"success": True, "message": "Succeeded to update model weights."}
        return web.json_response(done | {"num_paused_requests": 0})

    async def set_version(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not isinstance(body.get("new_version"), str):
            return refused(400, "body.new_version: Input should be a valid string")
        if body.get("abort_all_requests", True):
            for running in self.running:
                running.aborted = True
        if not self.take_fault("/update_weight_version", "ignored"):
            self.version = body["new_version"]
        await self.notify()
        told = f"Weight version updated to {body['new_version']}"
        answer = {"success": True, "message": told, "new_version": body["new_version"]}
        return web.json_response(answer)

    async def generate_tokens(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        tokens, params = body["input_ids"], body["sampling_params"]
        if bad := [token for token in tokens if not 0 <= token < VOCABULARY]:
            return refused(400, f"The input_ids hold {bad[0]}, outside of the vocabulary.")
        while self.paused:  # requests that come during a pause wait, and then run
            await self.wait_change()
        self.dead |= self.bad_load
        if self.dead:
            return refused(500, "Internal Server Error")
        if body.get("top_logprobs_num"):
            return web.json_response(self.probed(body))
        if params["max_new_tokens"] == 0:
            return web.json_response(self.echoed(body))
        self.seen.append(body)
        budget = params["max_new_tokens"]
        asked = Asked(len(tokens), budget, 0 if self.held else budget)
        if not params["ignore_eos"]:
            asked.obey(params["stop_token_ids"])
        asked.stops = tuple(params.get("stop") or ())
        asked.stream = body.get("stream", False)
        self.running.append(asked)
        await self.notify()
        try:
            if asked.stream:
                return await self.stream(request, asked)
            await self.sample(asked)
        finally:
            self.running = [other for other in self.running if other is not asked]
            await self.notify()
        return web.json_response(self.told(asked))

    async def stream(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sampling = asyncio.create_task(self.sample(asked))
        try:
            done = False
            while not done:
                await asyncio.wait([sampling], timeout=0.005)
                done = sampling.done()
                if done or len(asked.tokens) > asked.num_streamed:
                    data = json.dumps(self.told(asked, finished=done))
                    await response.write(f"data: {data}\n\n".encode())
                    await self.notify()
            await response.write(b"data: [DONE]\n\n")
        finally:
            sampling.cancel()
        return response

    def told(self, asked: Asked, *, finished: bool = True) -> dict[str, Any]:
        start = asked.num_streamed if asked.stream and self.incremental else 0
        asked.num_streamed = done = len(asked.tokens)
        meta = {
            "id": "f00d",
            "finish_reason": reason(asked) if finished else None,
            "prompt_tokens": asked.start,
            "weight_version": self.version,
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": entries(asked.logprobs, asked.tokens)[start:],
            "output_token_logprobs_length": done,
            "reasoning_tokens": 0,
            "completion_tokens": done,
            "cached_tokens": 0,
        }
        if finished:  # it has one even of no tokens
            empty = {"version": self.version, "start": 0, "end": 0}
            meta |= {"weight_versions": asked.spans or [empty], "e2e_latency": 0.1}
            meta["weight_version"] = meta["weight_versions"][-1]["version"]
        return {"text": "", "output_ids": asked.tokens[start:], "meta_info": meta}

    def probed(self, body: dict[str, Any]) -> dict[str, Any]:
        top = self.probe_answer(
            {"temperature": body["sampling_params"]["temperature"]}
            | {"logprobs": body["top_logprobs_num"]}
        )["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        asked = Asked(2, 1, 1, [0], [top[0]["logprob"]])
        answer = self.told(asked)
        answer["meta_info"]["output_top_logprobs"] = [
            entries([e["logprob"] for e in top], [e["token_id"] for e in top])
        ]
        return answer

    def echoed(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = body["input_ids"]
        number = int(self.version) if self.version.isdigit() else 98
        answer = self.told(Asked(len(tokens), 0, 0))
        given = [None, *[-(number + 1) / 10] * (len(tokens) - 1)]
        if body.get("logprob_start_len", -1) == 0:
            answer["meta_info"]["input_token_logprobs"] = entries(given, tokens)
        answer["meta_info"]["output_token_logprobs"] = [[-1.0, 5, None]]  # though none is sampled
        return answer

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.disturb], client_max_size=2**26)
        app.add_routes(
            [
                web.get("/model_info", self.model_info),
                web.get("/server_info", self.server_info),
                web.get("/health", self.health),
                web.post("/generate", self.generate_tokens),
                web.post("/pause_generation", self.pause_generation),
                web.post("/continue_generation", self.continue_generation),
                web.post("/update_weights_from_disk", self.update_weights),
                web.post("/update_weight_version", self.set_version),
                web.post("/fake/do", self.do),
            ]
        )
        return app


def reason(asked: Asked) -> dict[str, Any]:
    if asked.aborted:
        told = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    elif asked.matched is not None:
        told = {"type": "stop", "matched": asked.matched}
    elif asked.stop is not None:
        told = {"type": "stop", "matched": asked.stop}
    else:
        told = {"type": "length", "length": asked.budget}
    return told


def entries(logprobs: list[Any], tokens: list[int]) -> list[list[Any]]:
    return [[value, token, None] for value, token in zip(logprobs, tokens, strict=True)]


def refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def not_done(message: str) -> web.Response:
    answer = {"success": False, "message": message, "num_paused_requests": 0}
    return web.json_response(answer, status=400)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--incremental", action="store_true", help="stream only what is new")
    asyncio.run(serve(FakeSGLang(parser.parse_args())))


if __name__ == "__main__":
    main()
