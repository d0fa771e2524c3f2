"""``POST /v1/chat/completions`` of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdp_lightning.workflows.agent.apis.api import (
    Api,
    Event,
    arguments_of,
    others,
    read_count,
    read_flag,
    read_stop,
    read_tools,
    refuse,
    require_plain,
    usage,
)
from sdp_lightning.workflows.agent.request import AgentRequest, Answer, read_messages

_KNOWN = (
    *("model", "messages", "tools", "max_tokens", "max_completion_tokens", "stop", "stream"),
    *("stream_options", "n", "logprobs", "top_logprobs", "functions", "response_format", "user"),
    *("metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"),
    *("safety_identifier", "best_of", "suffix", "echo"),
)


class ChatCompletions(Api):
    """Chat completions: conversations with tools."""

    path = "/v1/chat/completions"

    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        require_plain(body)
        messages: Any = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise refuse(f"messages must be a list of messages, got {messages!r:.80}.")
        options: Any = body.get("stream_options")
        settings = others(body, _KNOWN)
        reads_calls = settings.get("tool_choice") != "none"
        if not reads_calls:
            del settings["tool_choice"]
        return AgentRequest(
            messages=read_messages(messages),
            tools=read_tools(body.get("tools")),
            reads_calls=reads_calls,
            max_tokens=read_count(body, "max_completion_tokens", "max_tokens"),
            stop=read_stop(body.get("stop")),
            is_streamed=read_flag(body, "stream"),
            settings=settings,
            echo={"usage": isinstance(options, Mapping) and bool(options.get("include_usage"))},
        )

    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "refusal": None,
        }
        if answer.calls:
            message["tool_calls"] = _calls(answer)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _reason(answer),
        }
        whole = self._whole(answer, model, "chat.completion")
        return {**whole, "choices": [choice], "usage": usage(answer)}

    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        whole = self._whole(answer, model, "chat.completion.chunk")

        def chunk(delta: dict[str, Any], reason: str | None = None) -> Event:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return Event({**whole, "choices": [choice]})

        yield chunk({"role": "assistant", "content": ""})
        if answer.text:
            yield chunk({"content": answer.text})
        for index, call in enumerate(_calls(answer)):
            yield chunk({"tool_calls": [{"index": index, **call}]})
        yield chunk({}, _reason(answer))
        if request.echo["usage"]:
            yield Event({**whole, "choices": [], "usage": usage(answer)})
        yield Event("[DONE]")

    @staticmethod
    def _whole(answer: Answer, model: str, kind: str) -> dict[str, Any]:
        about = {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created}
        return {**about, "model": model, "system_fingerprint": None}


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": arguments_of(call.arguments)},
        }
        for call in answer.calls
    ]


def _reason(answer: Answer) -> str:
    if answer.calls:
        return "tool_calls"
    return "length" if answer.is_cut else "stop"
