"""The wire format of vLLM servers: tokens in, tokens out, with version spans from 0.32 on.

The server must run with ``VLLM_SERVER_DEV_MODE=1`` (the routes for weights), ``--logprobs-mode
processed_logprobs``, this package's worker extension, and ``--enable-scale-out`` for the route that
gives spans; :mod:`sdp_lightning.engines.servers.managed` starts it so. Without spans the route is
``/v1/completions``, and every token has the version that its request was sent under.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, get_args

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote import answers
from sdp_lightning.engines.remote.backend import (
    Call,
    Chunk,
    Completion,
    OnUpdate,
    ServerInfo,
    assemble,
    check_logprobs,
    server_stop_texts,
    without_text,
)
from sdp_lightning.types import KVPolicy
from sdp_lightning.weights.protocol import (
    ApplyDelta,
    EngineTransfer,
    Instruction,
    LoadAdapter,
    LoadFolder,
    Receive,
    ServedType,
)

TOKENS, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
STREAM_INTERVAL = 16  # tokens per chunk
_reading, _unexpected = partial(answers.reading, "vLLM"), partial(answers.unexpected, "vLLM")
# Sent because /v1/completions otherwise reads them from the model's generation_config.json.
_PLAIN = {
    **{"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "repetition_penalty": 1.0,
}
_TRANSFER_ROUTES = {
    "init": ("/init_weight_transfer_engine", "init_info"),
    "start": ("/start_weight_update", None),
    "update": ("/update_weights", "update_info"),
    "finish": ("/finish_weight_update", None),
}
_DEV_MODE = "Start it with VLLM_SERVER_DEV_MODE=1 in its environment."
_LORA = "Start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
_REMEDIES = {
    **dict.fromkeys(("/pause", "/resume", "/weight_info", "/get_world_size"), _DEV_MODE),
    "/update_weight_version": _DEV_MODE,
    "/collective_rpc": f"{_DEV_MODE[:-1]}, with --worker-extension-cls "
    "sdp_lightning.engines.servers.vllm_worker.WorkerExtension, and this package on its "
    "PYTHONPATH.",
    "/v1/load_lora_adapter": _LORA,
    **{
        path: 'Start it with --weight-transfer-config \'{"backend": "nccl"}\', or "ipc".'
        for path, _ in _TRANSFER_ROUTES.values()
    },
}
# The field and value with which a route confirms that it is done; None: any non-empty value.
_DONE: dict[str, tuple[str, object]] = {
    "/pause": ("status", "paused"),
    "/resume": ("status", "resumed"),
    "/collective_rpc": ("results", None),
    "/update_weight_version": ("success", True),
    **{path: ("message", None) for path, _ in _TRANSFER_ROUTES.values()},
}


class VLLMBackend:
    """vLLM's ``/inference/v1/generate`` and its routes for reinforcement learning."""

    name = "vllm"

    def health(self) -> Call:
        return Call("GET", "/health")

    def remedy(self, call: Call) -> str:
        return _REMEDIES.get(call.path.partition("?")[0], "")

    def describe(self) -> Sequence[Call]:
        models, world = Call("GET", "/v1/models"), Call("GET", "/get_world_size")
        return (models, world, _rpc("sdp_hello"))

    def read_description(self, replies: Sequence[Any]) -> ServerInfo:
        models, world, hello = replies
        with _reading("/v1/models", "data[0].id and max_model_len", models):
            served = models["data"][0]
            model = answers.text(served["id"])
            max_length = answers.integer(served["max_model_len"], 1)
        with _reading("/get_world_size", "world_size", world):
            num_workers = answers.integer(world["world_size"], 1, answers.MAX_WORKERS)
        with _reading("/collective_rpc", "a list of types of every worker", hello):
            said = [kinds for kinds in hello["results"] if isinstance(kinds, list)]
            held = {answers.text(kind) for kinds in said for kind in kinds}
        one = next((kind for kind in get_args(ServedType) if held == {kind}), None)
        return ServerInfo(model, max_length, num_workers, served_type=one)

    def fallback(self, info: ServerInfo) -> ServerInfo | None:
        return replace(info, has_spans=False) if info.has_spans else None

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        sampling: dict[str, Any] = {"max_tokens": 1, "temperature": temperature, **_PLAIN}
        sampling |= {"logprobs": answers.PROBE_TOKENS, "top_p": 1.0, "top_k": 0}
        return _sample(info, [0, 1], sampling, stream=False)

    def read_probe(self, info: ServerInfo, at_one: Any, at_half: Any) -> None:
        remedy = "Start it with --logprobs-mode processed_logprobs."
        answers.check_temperature(
            _top_logprobs(info, at_one), _top_logprobs(info, at_half), remedy=remedy
        )

    def generate(self, request: GenerationRequest, info: ServerInfo, *, stream: bool) -> Call:
        params = request.params
        sampling: dict[str, Any] = {
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            **_PLAIN,
            "top_p": params.top_p,
            "top_k": 0 if params.top_k is None else params.top_k,
            "logprobs": 0,
            "seed": (request.seed + request.token_ids.size) % 2**63,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,  # those of the model's folder are among stop_token_ids
        }
        if bias := without_text(request, info):
            sampling["logit_bias"] = bias
        if texts := server_stop_texts(request):
            sampling |= {"stop": texts, "include_stop_str_in_output": True}
            sampling["skip_special_tokens"] = False
        tokens: list[int] = request.token_ids.tolist()
        return _sample(info, tokens, sampling, stream=stream)

    def read_completion(self, answer: Any, info: ServerInfo, version: int) -> Completion:
        chunk = self.read_chunk(answer, info)
        if chunk.finish_reason is None:
            raise _unexpected(_route(info), "a finish_reason", answer)
        return assemble([chunk], version)

    def read_chunk(self, answer: Any, info: ServerInfo) -> Chunk:
        with _reading(_route(info), "choices[0] with weight_versions (vLLM 0.32)", answer):
            choice = answer["choices"][0]
            tokens = answers.tokens(choice["token_ids"])
            logprobs = _logprobs(choice, info)
            reason = answers.FINISH_REASONS[choice["finish_reason"]]
            stop = choice.get("stop_reason") if reason == "stop" else None
            spans = choice["weight_versions"] if info.has_spans and reason else None
            edges = spans and answers.read_edges(spans)
        if info.has_spans and reason and tokens and not edges:
            raise _unexpected(TOKENS, "weight_versions (vLLM 0.32)", answer)
        stop_text = stop if isinstance(stop, str) else None  # else a token, or none
        return Chunk(tokens, logprobs, reason, edges or None, stop_text)

    def prompt_logprobs(self, token_ids: Sequence[int], info: ServerInfo) -> Call:
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        return _sample(info, list(token_ids), sampling, stream=False)

    def read_prompt_logprobs(self, answer: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
        with _reading("a prompt", "prompt_logprobs of every token", answer):
            entries = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
            pairs = zip(token_ids[1:], entries[1:], strict=True)
            logprobs = answers.numbers(entry[str(token)]["logprob"] for token, entry in pairs)
        check_logprobs(logprobs)
        return logprobs

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        mode = "abort" if on_update == "interrupt" else "keep"
        clear = "true" if kv_on_update == "recompute" else "false"
        return Call("POST", f"/pause?mode={mode}&clear_cache={clear}")

    def resume(self) -> Call:
        return Call("POST", "/resume")

    def load(self, instruction: Instruction) -> Call:
        match instruction:
            case LoadFolder(folder, keep):
                return _rpc("sdp_load_anchor" if keep else "sdp_load_folder", folder=folder)
            case ApplyDelta(folder):
                return _rpc("sdp_apply_delta", folder=folder)
            case Receive():
                return _rpc("sdp_receive", **asdict(instruction))
            case LoadAdapter(name, folder):
                body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
                return Call("POST", "/v1/load_lora_adapter", body, answer="text")
            case EngineTransfer(step, info):
                path, field = _TRANSFER_ROUTES[step]
                return Call("POST", path, None if field is None else {field: dict(info)})

    def set_version(self, label: str) -> Call:
        return Call("POST", "/update_weight_version", {"new_version": label})

    def read_done(self, call: Call, answer: Any) -> None:
        path = call.path.partition("?")[0]
        if call.answer == "text":
            if not str(answer).startswith("Success"):
                raise _unexpected(path, "Success", answer)
            return
        answers.check_done("vLLM", path, answer, *_DONE[path])

    def count_sampled(self) -> Call:
        return answers.METRICS

    def get_version(self) -> Call:
        return Call("GET", "/weight_info")

    def read_version(self, answer: Any) -> str:
        with _reading("/weight_info", "weight_version", answer):
            return answers.text(answer["weight_version"])


def _route(info: ServerInfo) -> str:
    return TOKENS if info.has_spans else COMPLETIONS


def _sample(info: ServerInfo, tokens: list[int], params: dict[str, Any], *, stream: bool) -> Call:
    body: dict[str, Any]
    if info.has_spans:
        if stream:
            params["stream_interval"] = STREAM_INTERVAL
        body = {"model": info.model, "token_ids": tokens, "sampling_params": params}
    else:
        body = {"model": info.model, "prompt": tokens, "return_token_ids": True, **params}
    if stream:
        body["stream"] = True
    return Call("POST", _route(info), body)


def _rpc(method: str, **arguments: Any) -> Call:
    return Call("POST", "/collective_rpc", {"method": method, "kwargs": arguments})


def _logprobs(choice: Any, info: ServerInfo) -> tuple[float, ...]:
    logprobs = choice["logprobs"]
    if logprobs is None:
        return ()
    if not info.has_spans:
        return answers.numbers(logprobs["token_logprobs"])
    return answers.numbers(entry["logprob"] for entry in logprobs["content"])


def _top_logprobs(info: ServerInfo, answer: Any) -> dict[str, float]:
    with _reading(_route(info), "top_logprobs", answer):
        logprobs = answer["choices"][0]["logprobs"]
        if not info.has_spans:
            top = logprobs["top_logprobs"][0]
            return dict(zip(top, answers.numbers(top.values()), strict=True))
        entries = logprobs["content"][0]["top_logprobs"]
        values = answers.numbers(entry["logprob"] for entry in entries)
        return {str(e["token_id"]): value for e, value in zip(entries, values, strict=True)}
