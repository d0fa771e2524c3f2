"""``POST /v1/completions`` of OpenAI's API, and ``POST /inference/v1/generate`` of vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdp_lightning.workflows.agent.apis.api import (
    Api,
    Event,
    others,
    read_count,
    read_flag,
    read_stop,
    refuse,
    require_plain,
    usage,
)
from sdp_lightning.workflows.agent.request import AgentRequest, Answer

_KNOWN = (
    *("model", "prompt", "max_tokens", "stop", "stream", "stream_options", "n", "logprobs"),
    *("best_of", "suffix", "echo", "user"),
)
_MOST_BY_DEFAULT = 16  # of OpenAI's API


class Completions(Api):
    """Completions: text, or tokens, that the policy continues; no chat template."""

    path = "/v1/completions"

    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        require_plain(body)
        prompt: Any = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if not isinstance(prompt, str) or not prompt:
            prompt = read_tokens(prompt, "prompt")
        options: Any = body.get("stream_options")
        return AgentRequest(
            prompt=prompt,
            max_tokens=read_count(body, "max_tokens") or _MOST_BY_DEFAULT,
            stop=read_stop(body.get("stop")),
            is_streamed=read_flag(body, "stream"),
            settings=others(body, _KNOWN),
            echo={"usage": isinstance(options, Mapping) and bool(options.get("include_usage"))},
        )

    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        reason = "length" if answer.is_cut else "stop"
        choice = {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": reason}
        about = {"id": f"cmpl-{answer.id}", "object": "text_completion", "created": answer.created}
        return {**about, "model": model, "choices": [choice], "usage": usage(answer)}

    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        whole = self.write(answer, request, model)
        counts = whole.pop("usage")
        yield Event(whole)
        if request.echo["usage"]:
            yield Event({**whole, "choices": [], "usage": counts})
        yield Event("[DONE]")


class Generate(Api):
    """Tokens in, tokens out: nothing is rendered or read."""

    path = "/inference/v1/generate"

    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        params: Any = body.get("sampling_params") or {}
        if not isinstance(params, Mapping):
            raise refuse(f"sampling_params must be a mapping, got {params!r:.80}.")
        require_plain(params)
        if read_flag(body, "stream"):
            raise refuse("stream is not supported here: leave it out.", "unsupported_parameter")
        known = ("max_tokens", "stop", "n", "logprobs")
        outer = others(body, ("model", "token_ids", "sampling_params", "request_id", "stream"))
        return AgentRequest(
            prompt=read_tokens(body.get("token_ids"), "token_ids"),
            max_tokens=read_count(params, "max_tokens"),
            stop=read_stop(params.get("stop")),
            settings={**others(params, known), **outer},
            echo={"request_id": body.get("request_id")},
        )

    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        reason = "length" if answer.is_cut else "stop"
        choice = {"index": 0, "token_ids": answer.turn.sampled, "finish_reason": reason}
        name = request.echo["request_id"] or answer.id
        return {"request_id": name, "choices": [{**choice, "logprobs": None}]}

    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        yield Event(self.write(answer, request, model))


def read_tokens(value: object, name: str) -> list[int]:
    """Token ids, at least one."""
    tokens: Any = value
    if (
        not isinstance(value, list)
        or not tokens
        or not all(type(token) is int and token >= 0 for token in tokens)
    ):
        raise refuse(f"{name} must be a text or token ids of 0 or more, got {value!r:.80}.")
    return tokens
