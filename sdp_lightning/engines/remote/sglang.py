"""The wire format of SGLang servers: their native HTTP API, tokens in and tokens out.

Written after the source of SGLang 0.5.23 and tested on a fake server; it was never run against a
real one. What is particular to SGLang:

- Output log-probs are of the distribution after the temperature and before top-p and top-k, so
  truncated sampling is refused. ``SGLANG_RETURN_ORIGINAL_LOGPROB=1`` in the server's environment
  takes the temperature out of them, which the probe refuses.
- ``ignore_eos`` also ignores ``stop_token_ids``: it is sent only without any. With some, a
  completion also ends at the end-of-sequence tokens of the folder that the server has loaded.
- Stop texts are looked for in the text of the last tokens of one request. ``no_stop_trim`` keeps
  them in the answer's text, of which nothing is read.
- A seed has an effect only under ``--enable-deterministic-inference``; the random number of a token
  then depends on seed and position, as ``GenerationRequest`` requires.
- ``/health`` samples a token and so never answers while sampling is paused: the health check is
  ``/server_info``, which asks the scheduler.
- Every load clears the caches.
- The server names the versions of every completion, and could keep requests across an update (its
  pause mode ``retract``); ``on_update="keep"`` is refused until that was tested.
- Streamed chunks hold all tokens so far, unless the server runs with
  ``--incremental-streaming-output``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

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
from sdp_lightning.engines.remote.responses import describe
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import FinishReason, KVPolicy
from sdp_lightning.weights.protocol import Instruction, LoadFolder

_reading = partial(answers.reading, "SGLang")
# The field and value with which a route confirms that it is done.
_DONE: dict[str, tuple[str, object]] = {
    "/pause_generation": ("status", "ok"),
    "/continue_generation": ("status", "ok"),
    "/update_weights_from_disk": ("success", True),
    "/update_weight_version": ("success", True),
}
# Sent because a server may have other defaults (--preferred-sampling-params).
_PLAIN_SAMPLING = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


class SGLangBackend:
    """SGLang's ``/generate`` and its routes for reinforcement learning."""

    name = "sglang"

    def health(self) -> Call:
        return Call("GET", "/server_info")

    def remedy(self, call: Call) -> str:
        return ""

    def describe(self) -> Sequence[Call]:
        return (Call("GET", "/model_info"), Call("GET", "/server_info"))

    def read_description(self, replies: Sequence[Any]) -> ServerInfo:
        model, server = replies
        with _reading("/model_info", "model_path", model):
            path = answers.text(model["model_path"])
        wanted = "max_req_input_len and incremental_streaming_output"
        with _reading("/server_info", wanted, server):
            return ServerInfo(
                path,
                answers.integer(server["max_req_input_len"], 1),  # 4 less than with the answer
                has_spans=False,
                streams_deltas=server["incremental_streaming_output"] is True,
            )

    def fallback(self, info: ServerInfo) -> ServerInfo | None:
        return None

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        sampling = {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True}
        return _generate([0, 1], sampling, top_logprobs_num=answers.PROBE_TOKENS)

    def read_probe(self, info: ServerInfo, at_one: Any, at_half: Any) -> None:
        remedy = "Start it without SGLANG_RETURN_ORIGINAL_LOGPROB."
        answers.check_temperature(_top_logprobs(at_one), _top_logprobs(at_half), remedy=remedy)

    def generate(self, request: GenerationRequest, info: ServerInfo, *, stream: bool) -> Call:
        params = request.params
        if params.top_p < 1 or params.top_k is not None:
            raise EngineError(
                f"SGLang's log-probs leave top_p={params.top_p} and top_k={params.top_k} out, so "
                "they are not those of the sampled distribution. Use top_p=1 and top_k=None."
            )
        if stream and not info.streams_deltas:
            raise EngineError(
                "the server repeats all tokens in every chunk that it streams. Start it with "
                "--incremental-streaming-output, or set stream=False."
            )
        sampling: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": not params.stop_token_ids,
            "sampling_seed": request.seed % 2**63,
        }
        if bias := without_text(request, info):
            sampling["logit_bias"] = bias
        if texts := server_stop_texts(request):
            sampling |= {"stop": texts, "no_stop_trim": True, "skip_special_tokens": False}
        return _generate(request.token_ids.tolist(), sampling, stream=stream)

    def read_completion(self, answer: Any, info: ServerInfo, version: int) -> Completion:
        chunk = _read_tokens(answer)
        if chunk.finish_reason is None:
            raise answers.unexpected("SGLang", "/generate", "meta_info.finish_reason", answer)
        return assemble([chunk], version)

    def read_chunk(self, answer: Any, info: ServerInfo) -> Chunk:
        reason, _ = _read_reason(answer)
        if reason == "abort" and "prompt_tokens" not in answer["meta_info"]:
            # Aborted while it was queued again: SGLang repeats the latest token.
            return Chunk((), (), reason, _read_edges(answer))
        return _read_tokens(answer)

    def prompt_logprobs(self, token_ids: Sequence[int], info: ServerInfo) -> Call:
        sampling = {"max_new_tokens": 0, "temperature": 1.0}
        return _generate(list(token_ids), sampling, logprob_start_len=0)

    def read_prompt_logprobs(self, answer: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
        with _reading("/generate", "meta_info.input_token_logprobs", answer):
            entries = answer["meta_info"]["input_token_logprobs"]
            answered = [answers.integer(entry[1]) for entry in entries]
            logprobs = answers.numbers(entry[0] for entry in entries[1:])
        # SGLang writes 0 for the last id of the vocabulary.
        same = all(a in (sent, 0) for a, sent in zip(answered, token_ids, strict=False))
        if len(answered) != len(token_ids) or not same:
            raise EngineError(f"SGLang echoed {answered} for {list(token_ids)}.")
        check_logprobs(logprobs)
        return logprobs

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        if on_update == "keep" or kv_on_update == "keep":
            raise ConfigError(
                f"on_update={on_update!r} and kv_on_update={kv_on_update!r}: on SGLang servers "
                "requests end when weights change, and every load clears the caches. Use "
                "on_update='interrupt' and kv_on_update='recompute'."
            )
        return Call("POST", "/pause_generation", {"mode": "abort"})

    def resume(self) -> Call:
        return Call("POST", "/continue_generation", {})

    def load(self, instruction: Instruction) -> Call:
        match instruction:
            case LoadFolder(folder, keep=False):
                body = {"model_path": folder, "load_format": "auto", "flush_cache": True}
                return Call("POST", "/update_weights_from_disk", body)
            case _:
                raise ConfigError(
                    f"SGLang servers cannot carry out {type(instruction).__name__}: this package "
                    "has no worker inside them. Use transport='files'."
                )

    def set_version(self, label: str) -> Call:
        body = {"new_version": label, "abort_all_requests": False}
        return Call("POST", "/update_weight_version", body)

    def read_done(self, call: Call, answer: Any) -> None:
        answers.check_done("SGLang", call.path, answer, *_DONE[call.path])

    def count_sampled(self) -> Call:
        return answers.METRICS

    def get_version(self) -> Call:
        return Call("GET", "/model_info")

    def read_version(self, answer: Any) -> str:
        with _reading("/model_info", "weight_version", answer):
            return answers.text(answer["weight_version"])


def _generate(tokens: list[int], sampling: dict[str, Any], **options: Any) -> Call:
    body = {
        "input_ids": tokens,
        "sampling_params": _PLAIN_SAMPLING | sampling,
        "return_logprob": True,
        **options,
    }
    return Call("POST", "/generate", body)


def _read_reason(answer: Any) -> tuple[FinishReason | None, str | None]:
    """Why the completion ended, None while it is being sampled; and the text that ended it.

    One that was not asked for is how SGLang reports logits that are nan.
    """
    with _reading("/generate", "meta_info.finish_reason", answer):
        reason = answer["meta_info"]["finish_reason"]
        if reason is None:
            return None, None
        finish_reason = answers.FINISH_REASONS[answers.text(reason["type"])]
        failed, matched = reason.get("status_code") is not None, reason.get("matched")
    if failed:
        raise EngineError(f"SGLang ended a request with {describe(reason)}.")
    return finish_reason, matched if isinstance(matched, str) else None


def _read_tokens(answer: Any) -> Chunk:
    reason, stop_text = _read_reason(answer)
    with _reading("/generate", "output_ids and meta_info.output_token_logprobs", answer):
        tokens = answers.tokens(answer["output_ids"])
        entries = answer["meta_info"]["output_token_logprobs"]
        logprobs = answers.numbers(entry[0] for entry in entries)
        named = tuple(entry[1] for entry in entries)
    if tokens != named:
        raise EngineError(
            f"SGLang answered the tokens {describe(tokens)} with log-probs of {describe(named)}: "
            "they must agree."
        )
    return Chunk(tokens, logprobs, reason, _read_edges(answer), stop_text)


def _read_edges(answer: Any) -> tuple[tuple[str, int, int], ...] | None:
    """The versions of all tokens so far; None from a server that names none."""
    with _reading("/generate", "meta_info.weight_versions", answer):
        meta = answer["meta_info"]
        if spans := meta.get("weight_versions"):
            return answers.read_edges(spans)
        if (version := meta.get("weight_version")) is None:
            return None
        return ((answers.text(version), 0, answers.integer(meta["completion_tokens"])),)


def _top_logprobs(answer: Any) -> dict[int, float]:
    with _reading("/generate", "meta_info.output_top_logprobs", answer):
        entries = answer["meta_info"]["output_top_logprobs"][0]
        values = answers.numbers(entry[0] for entry in entries)
        return {answers.integer(e[1]): value for e, value in zip(entries, values, strict=True)}
