"""The wire format of vLLM servers, from 0.32 on: tokens in, tokens out, with version spans.

The server must run with ``VLLM_SERVER_DEV_MODE=1`` (the routes for weights),
``--enable-scale-out`` (tokens in and out) and ``--logprobs-mode processed_logprobs``, and with this
package's worker extension; :mod:`sdp_lightning.engines.server` starts it so.
"""

from __future__ import annotations

from typing import Any

from sdp_lightning.engines.backend import Call, Completion, OnUpdate, ServerInfo, Span
from sdp_lightning.engines.base import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, KVPolicy

_PROBE_TOKENS = 5
_ODD = (KeyError, IndexError, TypeError, ValueError, OverflowError)  # JSON of another form
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
# What says that a route did its work; None: anything that is not empty.
_DONE: dict[str, tuple[str, object]] = {
    "/pause": ("status", "paused"),
    "/resume": ("status", "resumed"),
    "/collective_rpc": ("results", None),
    "/update_weight_version": ("success", True),
}


class VLLMBackend:
    """vLLM's ``/inference/v1/generate`` and its routes for reinforcement learning."""

    @property
    def name(self) -> str:
        return "vllm"

    def health(self) -> Call:
        return Call("GET", "/health")

    def describe(self) -> Call:
        return Call("GET", "/v1/models")

    def read_description(self, answer: Any) -> ServerInfo:
        try:
            served = answer["data"][0]
            return ServerInfo(model=str(served["id"]), max_length=int(served["max_model_len"]))
        except _ODD as error:
            raise _unexpected("/v1/models", "data[0].id and max_model_len", answer) from error

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        sampling = {"max_tokens": 1, "temperature": temperature, "logprobs": _PROBE_TOKENS}
        return Call("POST", "/inference/v1/generate", _body(info, [0, 1], sampling))

    def read_probe(self, at_one: Any, at_half: Any) -> None:
        one, half = _top_logprobs(at_one), _top_logprobs(at_half)
        common = one.keys() & half.keys()
        if not common or max(abs(one[token] - half[token]) for token in common) > 1e-6:
            return  # log-probs follow the temperature, as they must
        raise EngineError(
            "the server's log-probs ignore the temperature, so they are not those of the sampled "
            "distribution. Start it with --logprobs-mode processed_logprobs."
        )

    def generate(self, request: GenerationRequest, info: ServerInfo) -> Call:
        params = request.params
        sampling: dict[str, Any] = {
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "logprobs": 0,
            "seed": (request.seed + request.token_ids.size) % 2**63,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
        }
        if params.top_k is not None:
            sampling["top_k"] = params.top_k
        tokens: list[int] = request.token_ids.tolist()
        return Call("POST", "/inference/v1/generate", _body(info, tokens, sampling))

    def read_completion(self, answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            tokens = [int(token) for token in choice["token_ids"] or ()]
            content = (choice["logprobs"] or {"content": []})["content"]
            logprobs = [float(entry["logprob"]) for entry in content]
            reason = _REASONS[choice["finish_reason"]]
            spans = [
                (str(span["version"]), int(span["start"]), int(span["end"]))
                for span in choice["weight_versions"] or ()
            ]
        except _ODD as error:
            raise _unexpected(
                "/inference/v1/generate", "choices[0] with weight_versions (vLLM 0.32)", answer
            ) from error
        edges = [0, *(end for _, _, end in spans)]
        whole = edges[:-1] == [start for _, start, _ in spans] and edges == sorted(edges)
        if len(tokens) != len(logprobs) or edges[-1] != len(tokens) or not whole:
            raise EngineError(
                f"vLLM answered {len(tokens)} tokens, {len(logprobs)} log-probs and the versions "
                f"{spans}: they must agree."
            )
        return Completion(
            tuple(
                Span(version, tuple(tokens[start:end]), tuple(logprobs[start:end]))
                for version, start, end in spans
                if end > start
            ),
            reason,
        )

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        mode = "abort" if on_update == "interrupt" else "keep"
        clear = "true" if kv_on_update == "recompute" else "false"
        return Call("POST", f"/pause?mode={mode}&clear_cache={clear}")

    def resume(self) -> Call:
        return Call("POST", "/resume")

    def load_folder(self, folder: str) -> Call:
        body = {"method": "sdp_load_folder", "kwargs": {"folder": folder}}
        return Call("POST", "/collective_rpc", body)

    def set_version(self, version: int) -> Call:
        return Call("POST", "/update_weight_version", {"new_version": str(version)})

    def read_done(self, call: Call, answer: Any) -> None:
        path = call.path.partition("?")[0]
        field, done = _DONE[path]
        try:
            found = answer[field]
        except _ODD as error:
            raise _unexpected(path, field, answer) from error
        if found != done if done is not None else not found:
            raise _unexpected(path, f"{field}: {done or 'one a worker'}", answer)

    def get_version(self) -> Call:
        return Call("GET", "/weight_info")

    def read_version(self, answer: Any) -> str:
        try:
            return str(answer["weight_version"])
        except _ODD as error:
            raise _unexpected("/weight_info", "weight_version", answer) from error


def _body(info: ServerInfo, tokens: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    return {"model": info.model, "token_ids": tokens, "sampling_params": sampling}


def _top_logprobs(answer: Any) -> dict[int, float]:
    try:
        entry = answer["choices"][0]["logprobs"]["content"][0]
        return {int(e["token_id"]): float(e["logprob"]) for e in entry["top_logprobs"]}
    except _ODD as error:
        raise _unexpected("/inference/v1/generate", "top_logprobs", answer) from error


def _unexpected(path: str, wanted: str, answer: Any) -> EngineError:
    return EngineError(f"vLLM answered {path} without {wanted}: {str(answer)[:300]}")
