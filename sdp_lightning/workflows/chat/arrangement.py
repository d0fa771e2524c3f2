"""The ways in which one conversation can be given to a chat template that cannot take it as it is.

Templates differ in what they show: some want parts, some leave out or refuse roles, or a second
system message. An :class:`Arrangement` says what is changed; :func:`arrangements` orders them, the
smallest change first, and the first whose text has all that was said is used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdp_lightning.workflows.chat.messages import SPEAKERS, Message, as_json, calls_of

_BETWEEN = "\n\n"  # messages that are joined
_HOW = """You may call these functions, as often as you like:
{functions}
To call one, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call> and end your turn. \
A turn without a call is your answer."""


@dataclass(frozen=True)
class Arrangement:
    """What is changed of a conversation before it is given to the chat template.

    Attributes:
        parts: contents are lists of one part of text.
        text_arguments: arguments of calls are JSON texts.
        call_ids: calls and results are numbered by ids of nine letters and digits.
        by_prompt: a last message of the assistant follows the generation prompt.
        system_first: system messages after the head join the one at the head.
        tools_in_system: tools are described in the system message.
        joined: neighboring messages of one role are one message.
        system_as_user: system messages are the beginning of the user's next message.
        calls_as_text: calls are part of the content.
        results_as_user: what answers the assistant in another role is the user's.
    """

    parts: bool = False
    text_arguments: bool = False
    call_ids: bool = False
    by_prompt: bool = False
    system_first: bool = False
    tools_in_system: bool = False
    joined: bool = False
    system_as_user: bool = False
    calls_as_text: bool = False
    results_as_user: bool = False

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of what is changed."""
        return tuple(name for name, is_changed in vars(self).items() if is_changed)


# How far each change takes a conversation from what was said; form only: 1.
_COSTS = dict(
    zip([f.name for f in fields(Arrangement)], (1, 1, 1, 2, 3, 3, 3, 5, 6, 8), strict=True)
)

# Changes of which one has no effect beside the others.
_NEEDLESS = (
    {"calls_as_text", "text_arguments"},
    {"calls_as_text", "results_as_user", "call_ids"},
    {"system_first", "system_as_user"},
)


def arrangements(
    messages: Sequence[Message], tools: Sequence[Any], *, is_continued: bool
) -> tuple[Arrangement, ...]:
    """Arrangements that may help, the smallest change first; the first one changes nothing."""
    roles = [message["role"] for message in messages]
    has_calls = any(map(calls_of, messages))
    has_results = any(role not in SPEAKERS for role in roles)
    applies = {
        "parts": True,
        "text_arguments": has_calls,
        "call_ids": has_calls or has_results,
        "by_prompt": is_continued,
        "system_first": "system" in roles[1:] or "developer" in roles,
        "tools_in_system": bool(tools),
        "joined": any(a != "assistant" != b for a, b in itertools.pairwise(roles)),
        "system_as_user": "system" in roles or "developer" in roles or bool(tools),
        "calls_as_text": has_calls,
        "results_as_user": has_results,
    }
    return _ordered(tuple(name for name, is_possible in applies.items() if is_possible))


@functools.cache
def _ordered(names: tuple[str, ...]) -> tuple[Arrangement, ...]:
    chosen = [
        set(changes)
        for number in range(len(names) + 1)
        for changes in itertools.combinations(names, number)
        if not any(more <= {*changes} for more in _NEEDLESS)
    ]
    chosen.sort(key=lambda changes: sum(_COSTS[name] for name in changes))
    return tuple(Arrangement(**dict.fromkeys(changes, True)) for changes in chosen)


def arrange(
    messages: Sequence[Message], how: Arrangement, tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """``messages`` in the arrangement ``how``; system messages at the head are always one."""
    said = [dict(message) for message in messages]
    if tools and how.tools_in_system:
        said.insert(0, {"role": "system", "content": describe_tools(tools)})
    if how.results_as_user:
        said = _results_as_user(said)
    if how.system_first:
        said = [_renamed(m, "system") if m["role"] == "developer" else m for m in said]
        said.sort(key=lambda message: message["role"] != "system")
    said = _joined(said, lambda index, message: index == 0 and message["role"] == "system")
    if how.system_as_user:
        said = _system_as_user(said)
    if how.calls_as_text:
        said = [_with_calls_in_content(message) for message in said]
    if how.joined:
        said = _joined(said, lambda _, message: "tool_calls" not in message)
    if how.call_ids:
        _number_calls(said)
    for message in said:
        if how.text_arguments and "tool_calls" in message:
            message["tool_calls"] = [_with_text_arguments(c) for c in message["tool_calls"]]
        if how.parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return said


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says of ``tools``, where the chat template says nothing."""
    functions = "\n".join(as_json(tool.get("function", tool)) for tool in tools)
    return _HOW.format(functions=functions)


def _renamed(message: Message, role: str) -> Message:
    """The same content, said by ``role``."""
    return {"role": role, "content": message["content"]}


def _results_as_user(messages: Sequence[Message]) -> list[Message]:
    """``messages``, where those of other roles are the user's if they answer the assistant."""
    changed, speaker = list[Message](), ""
    for message in messages:
        role = message["role"]
        is_result = role not in (*SPEAKERS, "developer") and speaker == "assistant"
        speaker = role if role in SPEAKERS else speaker
        changed.append(_renamed(message, "user") if is_result else message)
    return changed


def _joined(messages: Sequence[Message], may_grow: Callable[[int, Message], bool]) -> list[Message]:
    """``messages``, where one that may grow takes in those of its role that follow it."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if (
            last.get("role") == message["role"]
            and may_grow(len(joined) - 1, last)
            and "tool_calls" not in message
        ):
            contents = filter(None, (last["content"], message["content"]))
            joined[-1] = {**last, "content": _BETWEEN.join(contents)}
        else:
            joined.append(message)
    return joined


def _system_as_user(messages: Sequence[Message]) -> list[Message]:
    """``messages``, where a system message is the beginning of the user's that follows it."""
    changed: list[Message] = []
    before = ""
    for message in messages:
        if message["role"] in ("system", "developer"):
            before = _BETWEEN.join(filter(None, (before, message["content"])))
            continue
        if before and message["role"] == "user":
            message = {**message, "content": f"{before}{_BETWEEN}{message['content']}"}
        elif before:
            changed.append({"role": "user", "content": before})
        before = ""
        changed.append(message)
    return [*changed, {"role": "user", "content": before}] if before else changed


def _with_calls_in_content(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = "\n".join(f"<tool_call>{as_json(call)}</tool_call>" for call in calls_of(message))
    content = "\n".join(filter(None, (message["content"], calls)))
    return {"role": message["role"], "content": content}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else as_json(arguments)
    return {**call, "function": {**call["function"], "arguments": text}}


def _number_calls(messages: Sequence[Message]) -> None:
    """Number the calls, and the results in the order of their calls."""
    num_calls = num_results = 0
    for message in messages:
        for_calls: list[dict[str, Any]] = []
        for call in message.get("tool_calls", ()):
            for_calls.append({**call, "id": f"call{num_calls:05}"})
            num_calls += 1
        if for_calls:
            message["tool_calls"] = for_calls
        elif message["role"] not in SPEAKERS:
            message["tool_call_id"] = f"call{num_results:05}"
            num_results += 1
