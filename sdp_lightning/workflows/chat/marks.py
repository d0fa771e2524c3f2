"""Marks that stand for what messages say, to see what a template does with messages of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdp_lightning.workflows.chat.messages import Message, calls_of

MARK = "c95bd1b5e8"  # the assistant's turn; no white space: templates strip it
EARLIER = "e13b9a5d70"  # contents of messages of which only the roles matter
_ALWAYS = {"role", "content"}


def marked(messages: Sequence[Message]) -> list[Message]:
    """``messages`` with marks for contents, and with calls of one form."""
    probes: list[Message] = []
    for number, message in enumerate(messages):
        mark = f"m{number}x{MARK[::-1]}"
        probes.append({**message, "content": mark if message["content"] else ""})
        if calls := calls_of(message):
            texts = [isinstance(call["arguments"], str) for call in calls]
            functions = [{"name": mark, "arguments": "a" if t else {"a": "b"}} for t in texts]
            probes[-1]["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return probes


def others_of(probes: Sequence[Message], said: Sequence[Message]) -> list[tuple[int, str]]:
    """Indices and roles in ``said`` of what neither the user nor the assistant says.

    Args:
        probes: messages with marks.
        said: these messages, arranged, among others.
    """
    marks = [m["content"] for m in probes if m["content"]]
    return [
        (index, message["role"])
        for index, message in enumerate(said)
        if message["role"] not in ("user", "assistant")
        and any(mark in str(message["content"]) for mark in marks)
    ]


def kind_of_messages(messages: Sequence[Message]) -> tuple[Any, ...]:
    """What matters of messages for their arrangement: roles, keys, calls, which are empty."""
    return tuple(
        (
            *(m["role"], bool(m["content"]), *sorted(set(m) - _ALWAYS)),
            *(isinstance(call["arguments"], str) for call in calls_of(m)),
        )
        for m in messages
    )
