"""``POST /v1/responses`` of OpenAI's API. Nothing is stored: a request brings its whole history."""

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
    refuse,
    tool_of,
    usage,
)
from sdp_lightning.workflows.agent.request import AgentRequest, Answer, Tool, read_messages
from sdp_lightning.workflows.chat.messages import Message

_KNOWN = (
    *("model", "input", "instructions", "tools", "max_output_tokens", "stream", "store", "user"),
    *("metadata", "parallel_tool_calls", "include", "service_tier", "prompt_cache_key", "text"),
    *("previous_response_id", "conversation", "background", "stream_options", "truncation"),
    *("safety_identifier", "prompt_cache_retention"),
)
_SERVER_SIDE = ("previous_response_id", "conversation", "background", "prompt")


class Responses(Api):
    """Responses: items of messages, calls and their results."""

    path = "/v1/responses"

    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        for name in _SERVER_SIDE:
            if body.get(name):
                raise refuse(
                    f"{name} is not supported, as nothing is stored here: send the whole history "
                    "as input.",
                    "unsupported_parameter",
                )
        text: Any = body.get("text")
        form: Any = text.get("format") if isinstance(text, Mapping) else None
        if isinstance(form, Mapping) and form.get("type", "text") != "text":
            raise refuse(f"text.format={form!r:.80} is not supported.", "unsupported_parameter")
        messages: list[Message] = []
        if body.get("instructions"):
            messages.append({"role": "system", "content": _text_of(body["instructions"])})
        given: Any = body.get("input")
        items: Any = [{"role": "user", "content": given}] if isinstance(given, str) else given
        for item in read_list(items, "input"):
            _add(messages, item)
        settings = others(body, _KNOWN)
        reads_calls = settings.get("tool_choice") != "none"
        if not reads_calls:
            del settings["tool_choice"]
        return AgentRequest(
            messages=read_messages(messages),
            tools=_tools(body.get("tools")),
            reads_calls=reads_calls,
            max_tokens=read_count(body, "max_output_tokens"),
            is_streamed=read_flag(body, "stream"),
            settings=settings,
            echo={name: body.get(name) for name in ("instructions", "metadata", "tools")},
        )

    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        counts = usage(answer)
        return {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": answer.created,
            "status": "incomplete" if answer.is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if answer.is_cut else None,
            "error": None,
            "instructions": request.echo["instructions"],
            "metadata": request.echo["metadata"] or {},
            "model": model,
            "output": _items(answer),
            "parallel_tool_calls": True,
            "temperature": None,
            "top_p": None,
            "tool_choice": "auto",
            "tools": request.echo["tools"] or [],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        whole = self.write(answer, request, model)
        begun = {**whole, "status": "in_progress", "output": [], "usage": None}
        steps: list[tuple[str, dict[str, Any]]] = [
            ("response.created", {"response": begun}),
            ("response.in_progress", {"response": begun}),
        ]
        for index, item in enumerate(whole["output"]):
            steps += _steps_of_item(index, item)
        steps.append((f"response.{whole['status']}", {"response": whole}))
        for number, (name, data) in enumerate(steps):
            yield Event({"type": name, "sequence_number": number, **data}, name)


def _items(answer: Answer) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if answer.text or not answer.calls:
        part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
        about = {"type": "message", "id": f"msg_{answer.id}", "status": "completed"}
        items.append({**about, "role": "assistant", "content": [part]})
    for number, call in enumerate(answer.calls):
        about = {"type": "function_call", "id": f"fc_{answer.id}{number}", "status": "completed"}
        arguments = arguments_of(call.arguments)
        items.append({**about, "call_id": call.id, "name": call.name, "arguments": arguments})
    return items


def _steps_of_item(index: int, item: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Events of one item of an answer, from its beginning to its end."""
    place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
    done = ("response.output_item.done", {"output_index": index, "item": item})
    if item["type"] == "function_call":
        begun, arguments = {**item, "arguments": "", "status": "in_progress"}, item["arguments"]
        name = "response.function_call_arguments"
        return [
            ("response.output_item.added", {"output_index": index, "item": begun}),
            (f"{name}.delta", {**place, "delta": arguments}),
            (f"{name}.done", {**place, "name": item["name"], "arguments": arguments}),
            done,
        ]
    begun = {**item, "content": [], "status": "in_progress"}
    [part] = item["content"]
    place["content_index"] = 0
    return [
        ("response.output_item.added", {"output_index": index, "item": begun}),
        ("response.content_part.added", {**place, "part": {**part, "text": ""}}),
        ("response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}),
        ("response.output_text.done", {**place, "text": part["text"], "logprobs": []}),
        ("response.content_part.done", {**place, "part": part}),
        done,
    ]


def _add(messages: list[Message], item: object) -> None:
    """Add what an item says; calls belong to the message of the assistant before them."""
    given: Any = item if isinstance(item, Mapping) else {}
    kind = given.get("type", "message")
    if kind == "message" and isinstance(given.get("role"), str):
        messages.append({"role": given["role"], "content": _text_of(given.get("content"))})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": given.get("name"), "arguments": given.get("arguments")}
        call = {"id": given.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text_of(given.get("output"))
        messages.append({"role": "tool", "content": text, "tool_call_id": given.get("call_id")})
    elif kind != "reasoning":
        raise refuse(f"an item of type {kind!r:.80} is not supported: {item!r:.80}.")


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in read_list(content, "content"):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise refuse(f"content must be text or parts of text, got {part!r:.80}.")
        texts.append(part["text"])
    return "".join(texts)


def _tools(value: object) -> list[Tool]:
    tools: list[Tool] = []
    for given in read_list(value or [], "tools"):
        if not isinstance(given, Mapping) or given.get("type") != "function":
            raise refuse(f"a tool must be of type function, got {given!r:.80}.")
        tools.append(tool_of(given))
    return tools
