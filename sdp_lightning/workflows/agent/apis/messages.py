"""``POST /v1/messages`` of Anthropic's API."""

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
    read_list,
    read_stop,
    refuse,
    tool_of,
)
from sdp_lightning.workflows.agent.request import (
    AgentRequest,
    Answer,
    RefusedRequest,
    Tool,
    read_messages,
)
from sdp_lightning.workflows.chat.messages import Message

_KNOWN = (
    *("model", "messages", "system", "tools", "max_tokens", "stop_sequences", "stream"),
    *("metadata", "service_tier"),
)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
}


class Messages(Api):
    """Anthropic's messages: conversations of blocks, with tools."""

    path = "/v1/messages"

    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        if read_count(body, "max_tokens") is None:
            raise refuse("max_tokens must be an integer of at least 1; it is missing.")
        settings = others(body, _KNOWN)
        choice: Any = settings.get("tool_choice")
        kind = choice.get("type") if isinstance(choice, Mapping) else None
        if kind in ("auto", "none"):
            del settings["tool_choice"]
        messages: list[Message] = []
        if body.get("system"):
            messages.append({"role": "system", "content": _text_of(body["system"], "system")})
        for message in read_list(body.get("messages"), "messages"):
            messages += _in_openais_form(message)
        if not messages:
            raise refuse("messages must have a message.")
        return AgentRequest(
            messages=read_messages(messages),
            tools=_tools(body.get("tools")),
            reads_calls=kind != "none",
            max_tokens=read_count(body, "max_tokens"),
            stop=read_stop(body.get("stop_sequences"), "stop_sequences"),
            is_streamed=read_flag(body, "stream"),
            settings=settings,
        )

    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": answer.text}]
        if not answer.text:
            blocks.clear()
        for call in answer.calls:
            block = {"type": "tool_use", "id": call.id, "name": call.name}
            blocks.append({**block, "input": dict(call.arguments)})
        return {
            "id": f"msg_{answer.id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": blocks,
            "stop_reason": _reason(answer),
            "stop_sequence": None,
            "usage": {
                "input_tokens": answer.turn.num_read,
                "output_tokens": len(answer.turn.sampled),
            },
        }

    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        whole = self.write(answer, request, model)
        empty = {**whole, "content": [], "stop_reason": None}
        yield Event({"type": "message_start", "message": empty}, "message_start")
        for index, block in enumerate(whole["content"]):
            if block["type"] == "text":
                start, delta = {"text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                text = arguments_of(block["input"])
                start, delta = {"input": {}}, {"type": "input_json_delta", "partial_json": text}
            yield _event("content_block_start", index=index, content_block={**block, **start})
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        ended = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        usage = {"output_tokens": whole["usage"]["output_tokens"]}
        yield _event("message_delta", delta=ended, usage=usage)
        yield _event("message_stop")

    def error(self, refused: RefusedRequest) -> dict[str, Any]:
        kind = _KINDS.get(refused.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(refused)}}


def _event(name: str, **data: Any) -> Event:
    return Event({"type": name, **data}, name)


def _reason(answer: Answer) -> str:
    if answer.calls:
        return "tool_use"
    return "max_tokens" if answer.is_cut else "end_turn"


def _tools(value: object) -> list[Tool]:
    tools: list[Tool] = []
    for given in read_list(value or [], "tools"):
        if not isinstance(given, Mapping) or given.get("type", "custom") != "custom":
            raise refuse(f"a tool must have a name and an input_schema, got {given!r:.80}.")
        tools.append(tool_of({**given, "parameters": given.get("input_schema")}))
    return tools


def _in_openais_form(message: object) -> list[Message]:
    """A message of blocks as messages of text, of calls, and of their results."""
    given: Any = message
    if not isinstance(given, Mapping) or given.get("role") not in ("user", "assistant", "system"):
        raise refuse(f"a message must have the role user or assistant, got {given!r:.80}.")
    role, content = given["role"], given.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    said: list[Message] = []
    calls: list[Any] = []
    for block in read_list(content, "content"):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            if not said or said[-1]["role"] != role:
                said.append({"role": role, "content": ""})
            said[-1]["content"] += str(block.get("text", ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = _text_of(block.get("content") or "", "tool_result")
            said.append({"role": "tool", "content": text, "tool_call_id": block.get("tool_use_id")})
        elif kind not in ("thinking", "redacted_thinking"):
            raise refuse(f"a block of type {kind!r} is not supported: models are trained on text.")
    if role == "assistant":
        said = said or [{"role": role, "content": ""}]
        said[-1] |= {"tool_calls": calls} if calls else {}
    return said


def _text_of(content: object, what: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in read_list(content, what):
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise refuse(f"{what} must be text or blocks of text, got {block!r:.80}.")
        texts.append(str(block.get("text", "")))
    return "".join(texts)
