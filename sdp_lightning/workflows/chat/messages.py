"""Messages as datasets and environments give them, in the one form that rendering starts from.

A message is a dict of a role, a content that is a text, and what else it had but what is None.
Parts of text are joined, arguments of calls are mappings, and a text is a message of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdp_lightning.errors import RolloutError

Message = dict[str, Any]
SPEAKERS = ("system", "user", "assistant")  # all others bring what a tool or a world says
_LONGEST_SHOWN = 200  # characters of a prompt or an observation in an error


def is_conversation(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of messages."""
    return isinstance(prompt, list | tuple) and all(isinstance(m, Mapping) for m in prompt)


def as_messages(said: Any, what: str = "observation") -> list[Message]:
    """The messages of an observation or a prompt.

    Args:
        said: text, one message, or a list of messages.
        what: what it is called in errors.

    Raises:
        RolloutError: if it is neither text nor messages, or a message has more than text in it.
    """
    if isinstance(said, np.ndarray):
        said = said.tolist()
    if isinstance(said, str):
        return [{"role": "user", "content": encodable(said)}]
    messages: Any = [said] if isinstance(said, Mapping) else said
    if not is_conversation(messages):
        raise RolloutError(
            f"the {what} {shown(said)} is neither text nor a list of {{'role', 'content'}} "
            "messages."
        )
    return [_as_message(message, index, what) for index, message in enumerate(messages)]


def encodable(text: str) -> str:
    r"""``text`` with U+FFFD for each lone surrogate, which tokenizers refuse.

    JSON may hold one (``"\\ud800"``), so an environment that repeats its call may, too.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(value: object) -> str:
    """``repr(value)``, cut to what an error can hold."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def as_json(value: Any) -> str:
    """``value`` as JSON; what JSON lacks is a text in it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def is_open(message: Mapping[str, Any]) -> bool:
    """Whether a last message is to be continued: it is the assistant's, and calls nothing."""
    return message["role"] == "assistant" and "tool_calls" not in message


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a message calls: ``{"name": ..., "arguments": ...}`` of each."""
    return [call["function"] for call in message.get("tool_calls", ())]


def _as_message(given: Mapping[str, Any], index: int, what: str) -> Message:
    message = {str(k): v for k, v in given.items() if v is not None}
    role = message.get("role")
    if not isinstance(role, str) or set(message) == {"role"}:
        raise RolloutError(
            f"message {index} of the {what}, {shown(dict(given))}, is neither text nor a list of "
            "{'role', 'content'} messages: it needs a role and a content."
        )
    message["content"] = _text_of(message.get("content", ""), role, index, what)
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_as_call(call, index, what) for call in calls]
    return message


def _text_of(content: Any, role: str, index: int, what: str) -> str:
    """The text of a content. What a tool returned may be any value, and is JSON then."""
    if isinstance(content, np.ndarray | np.generic):
        content = content.tolist()
    if isinstance(content, str):
        return encodable(content)
    parts = cast("Sequence[Any]", content) if isinstance(content, list | tuple) else None
    kind = None if parts is None else _other_than_text(parts)
    if parts is not None and kind is None:
        return encodable("".join(part["text"] for part in parts if part.get("text") is not None))
    if role not in SPEAKERS and not (parts and all(isinstance(p, Mapping) for p in parts)):
        return encodable(as_json(content))
    if kind is None:
        raise RolloutError(
            f"message {index} of the {what} ({role}) has the content {shown(content)}, which is "
            f"neither text nor a list of parts of text. Make it a text."
        )
    raise RolloutError(
        f"message {index} of the {what}: the {role}'s message has a part of type {kind!r}, and "
        "models are trained on text only. Leave it out, or say in words what it shows."
    )


def _other_than_text(parts: Sequence[Any]) -> str | None:
    """The kind of the first part that is no text; None if all are."""
    for part in parts:
        if not isinstance(part, Mapping):
            return type(part).__name__
        fields = {k: v for k, v in cast("Mapping[str, Any]", part).items() if v is not None}
        kind = fields.get("type", "text" if "text" in fields else ", ".join(fields))
        if kind != "text" or not isinstance(fields.get("text", ""), str):
            return str(kind)
    return None


def _as_call(call: Any, index: int, what: str) -> dict[str, Any]:
    given: Any = call.get("function", call) if isinstance(call, Mapping) else None
    name: Any = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str):
        raise RolloutError(
            f"message {index} of the {what} has the tool call {shown(call)}; it must be "
            "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}."
        )
    arguments: Any = given.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            read: Any = json.loads(arguments)
        except (ValueError, RecursionError):
            read = None
        arguments = read if isinstance(read, dict) else arguments
    function = {"name": name, "arguments": _without_none(arguments)}
    kept = {k: v for k, v in call.items() if k in ("id", "index") and v is not None}
    return {**kept, "type": "function", "function": function}


def _without_none(value: Any) -> Any:
    """``value`` without keys that are None: readers of tables make them, of all rows' keys."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, Any]", value).items()
        return {key: _without_none(part) for key, part in pairs if part is not None}
    if isinstance(value, list | tuple):
        return [_without_none(part) for part in cast("Sequence[Any]", value)]
    return value
