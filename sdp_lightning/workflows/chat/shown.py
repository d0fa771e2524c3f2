"""Whether a text has all that a conversation says: contents, calls, and the tools there are.

Templates may trim and collapse white space, and write a content as JSON; nothing else is forgiven.
Thinking of the assistant's earlier turns may be left out, as templates of thinking models do.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from sdp_lightning.workflows.chat.messages import Message, calls_of

# The end of a part of a content, by which templates know what was thought before it.
_CLOSING = re.compile(r"(</[^<>\s]+>|\[/[^\[\]\s]+\]|<[^<>\s]*\|>)")
_MOST_MARKS = 20


class _Reader:
    """Finds texts in a longer one, each after the one before it.

    Args:
        text: the longer text.
        prepare: what becomes of a text before it is looked for.
    """

    def __init__(self, text: str, prepare: Callable[[str], str]) -> None:
        self._text, self._prepare = text, prepare
        self._at = 0

    def find(self, said: str, *, in_order: bool = True) -> bool:
        """Whether ``said``, or how JSON writes it, is in the text; after the last if in order."""
        start = self._at if in_order else 0
        for form in _forms(said):
            word = self._prepare(form)
            if (at := self._text.find(word, start)) >= 0:
                self._at = max(self._at, at + len(word)) if in_order else self._at
                return True
        return False

    def find_answer(self, said: str, *, may_be_empty: bool) -> bool:
        """Whether the text has what follows a closing mark in ``said``, such as ``</think>``."""
        ends = (mark.end() for mark in itertools.islice(_CLOSING.finditer(said), _MOST_MARKS))
        rests = (said[end:].strip() for end in ends)
        return any(self.find(rest) if rest else may_be_empty for rest in rests)


def _forms(said: str) -> Iterator[str]:
    yield said
    stripped = said.strip()
    for ascii_only in (False, True):
        written = json.dumps(stripped, ensure_ascii=ascii_only)[1:-1]
        if written != stripped:
            yield written


def _squeezed(text: str) -> str:
    """``text`` without its white space."""
    return "".join(text.split())


def what_is_lost(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    *,
    is_continued: bool = False,
    trimmed: list[str] | None = None,
) -> str:
    """The first thing that ``text`` lacks of a conversation; empty if it has all.

    Args:
        messages: what was said.
        tools: JSON schemas of functions.
        text: what the policy reads.
        is_continued: whether the last message is to be continued, and so stands there whole.
        trimmed: gains an entry for what is left out that may be.
    """
    given, notes = (messages, tools, is_continued), list[str]()
    lost = _what_is_lost(_Reader(text, str.strip), *given, notes)
    if lost:
        notes.clear()
        lost = _what_is_lost(_Reader(_squeezed(text), _squeezed), *given, notes)
    if trimmed is not None:
        trimmed += notes
    return lost


def _what_is_lost(
    reader: _Reader,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    is_continued: bool,
    trimmed: list[str],
) -> str:
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        in_order = role not in ("system", "developer")
        if not reader.find(content, in_order=in_order):
            is_last = is_continued and index == len(messages) - 1
            has_calls = "tool_calls" in message
            if (
                role != "assistant"
                or is_last
                or not reader.find_answer(content, may_be_empty=has_calls)
            ):
                return f"message {index} ({role})"
            trimmed.append(f"what the assistant thought in message {index}")
        for call in calls_of(message):
            if not reader.find(call["name"]) or not all(
                reader.find(leaf, in_order=False) for leaf in _leaves(call["arguments"])
            ):
                return f"the call of {call['name']!r} in message {index} ({role})"
    for tool in tools:
        function: Mapping[str, Any] = tool.get("function", tool)
        for said in (function.get("name", ""), function.get("description") or ""):
            if not reader.find(str(said), in_order=False):
                return f"the tool {function.get('name')!r}"
    return ""


def written_as_python(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
) -> str:
    """A value that ``text`` has as Python's ``repr`` of it; empty if there is none.

    Args:
        messages: as they were given to the template.
        tools: that were given to it.
        text: what it wrote.
    """
    contents = [m["content"] for m in messages]
    texts = [c if isinstance(c, str) else c[0]["text"] for c in contents]
    if any(isinstance(content, list) for content in contents):
        contents.append([{"type": "text"}])
    given = [*contents, *tools, *(m["tool_calls"] for m in messages if "tool_calls" in m)]
    for part in (part for value in given for part in _containers(value)):
        written = repr(part)[:-2] if part == [{"type": "text"}] else repr(part)
        if (
            written in text
            and text.count(written) > sum(t.count(written) for t in texts)
            and written != json.dumps(part, ensure_ascii=False, default=str)
        ):
            return written[:80]
    return ""


def _containers(value: Any) -> Iterator[Any]:
    """``value`` and all lists and mappings in it, but empty ones."""
    if isinstance(value, Mapping | list) and value:
        yield value
        parts = value.values() if isinstance(value, Mapping) else value
        for part in cast("Sequence[Any]", parts):
            yield from _containers(part)


def _leaves(value: Any) -> Iterator[str]:
    """Names and values in the arguments of a call, as texts."""
    if isinstance(value, Mapping):
        for key, part in cast("Mapping[str, Any]", value).items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in cast("list[Any]", value):
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, bool):  # families write true and True
        yield json.dumps(value, default=str)
