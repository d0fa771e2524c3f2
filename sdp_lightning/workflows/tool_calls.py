"""Finds the calls of tools in what the policy wrote, in the formats of the model families.

What the policy wrote is data: it is read in one pass, and whatever is wrong with a call is its
``error``, for the policy to read. Nothing here raises for a text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sdp_lightning.rewards.text import between_tags
from sdp_lightning.workflows.environment import shown

_NO_CALL = "the call is no JSON of a name and arguments"
_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")  # keys, by family
_BLANKS = re.compile(r"[\s;,]*")
_WORD = re.compile(r"[^\s<]*")
_ENDS = ("<|call|>", "<|end|>", "<|return|>", "<|start|>")  # of a message of harmony


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: name of the tool, whatever the policy wrote.
        arguments: the arguments by name, or what stands in their place.
        id: the policy's own id of the call, if it wrote one.
        are_texts: whether each argument is the text that stood there, not yet a value.
        error: what is wrong with the call, for the policy; empty if nothing is.
    """

    name: str = ""
    arguments: Any = field(default_factory=dict[str, Any])
    id: str = ""
    are_texts: bool = False
    error: str = ""


CallReader = Callable[[str], list[ToolCall]]  # of a turn; no call: the turn is an answer


# JSON ---------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)


def read_json(text: str) -> Any:
    """The value of a JSON text, in which no key is twice and every number is finite.

    Raises:
        ValueError: if it is none.
        RecursionError: if it is too deep.
    """
    return _JSON.decode(text)


def call_of(value: Any) -> ToolCall:
    """The call that a value of JSON says, by the keys of any family."""
    wanted: Mapping[str, Any] = value if isinstance(value, dict) else {}
    call_id = wanted.get("id", "")
    if isinstance(wanted.get("function"), dict):
        wanted = wanted["function"]
    found = [wanted[key] for key in _NAMES if key in wanted]
    if not found:
        return ToolCall(error=_NO_CALL)
    if not isinstance(name := found[0], str):
        return ToolCall(error=f"the name must be a text; it is {type(name).__name__}")
    arguments = next((wanted[key] for key in _ARGUMENTS if key in wanted), {})
    call_id = call_id if isinstance(call_id, str) else ""
    if isinstance(arguments, str):  # JSON in JSON
        return _with_arguments(name, arguments, call_id)
    return ToolCall(name, arguments, call_id)


def _with_arguments(name: str, text: str, call_id: str = "") -> ToolCall:
    """A call whose arguments are a JSON text; none is no arguments."""
    try:
        return ToolCall(name, read_json(text) if text.strip() else {}, call_id)
    except (ValueError, RecursionError) as error:
        return _bad(f"the arguments of {shown(name)} are no JSON", error, name)


def _bad(what: str, error: Exception, name: str = "") -> ToolCall:
    return ToolCall(name, error=f"{what} ({shown(error)})")


# Formats ------------------------------------------------------------------------------------------


def read_tagged(text: str) -> list[ToolCall]:
    """``<tool_call>...</tool_call>`` of Hermes and Qwen (JSON), Qwen3-Coder and GLM (tags).

    >>> [call.name for call in read_tagged('<tool_call>{"name": "f"}</tool_call> and so on')]
    ['f']
    """
    bodies = between_tags(text, "<tool_call>", "</tool_call>")
    return [_read_tagged_call(body.strip()) for body in bodies]


def _read_tagged_call(body: str) -> ToolCall:
    if body.startswith("<function="):
        name, _, rest = body.removeprefix("<function=").partition(">")
        parts = [part.partition(">") for part in between_tags(rest, "<parameter=", "</parameter>")]
        pairs = [(key, value.removeprefix("\n").removesuffix("\n")) for key, _, value in parts]
        return _with_texts(name, pairs)
    name, mark, rest = body.partition("<arg_key>")
    if mark:
        keys = between_tags(mark + rest, mark, "</arg_key>")
        values = between_tags(rest, "<arg_value>", "</arg_value>")
        if len(keys) != len(values):
            return ToolCall(error=f"the call has {len(keys)} keys and {len(values)} values")
        return _with_texts(name, list(zip(keys, values, strict=True)))
    try:
        return call_of(read_json(body))
    except (ValueError, RecursionError) as error:
        return ToolCall(body) if body.isidentifier() else _bad(_NO_CALL, error)


def _with_texts(name: str, pairs: list[tuple[str, str]]) -> ToolCall:
    arguments = {key.strip(): value for key, value in pairs}
    if len(arguments) < len(pairs):
        return ToolCall(error=f"an argument of {shown(name.strip())} is there twice")
    return ToolCall(name.strip(), arguments, are_texts=True)


def read_mistral(text: str) -> list[ToolCall]:
    """``[TOOL_CALLS]`` of Mistral: a JSON list, or ``name[ARGS]{...}`` each.

    >>> [call.name for call in read_mistral('[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}')]
    ['f', 'g']
    """
    calls: list[ToolCall] = []
    for piece in text.split("[TOOL_CALLS]")[1:]:
        head, mark, arguments = piece.partition("[ARGS]")
        if not mark and piece.lstrip()[:1] in ("[", "{"):
            calls += _read_values(piece)
            continue
        if not mark:
            head, mark, arguments = piece.partition("{")
            arguments = mark + arguments
        name, _, call_id = head.partition("[CALL_ID]")
        calls.append(_with_arguments(name.strip(), arguments, call_id.strip()))
    return calls


def read_harmony(text: str) -> list[ToolCall]:
    """Messages to ``functions.name`` of gpt-oss's harmony.

    >>> text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    >>> [call.name for call in read_harmony(text)]
    ['f']
    """
    calls: list[ToolCall] = []
    header, *pieces = text.split("<|message|>")
    for piece in pieces:
        ends = [place for mark in _ENDS if (place := piece.find(mark)) >= 0]
        end = min(ends, default=len(piece))
        _, mark, recipient = header.rpartition("to=")
        word = _WORD.match(recipient) if mark else None
        if word is not None:
            calls.append(_with_arguments(word[0].removeprefix("functions."), piece[:end]))
        header = piece[end:]
    return calls


def read_bare(text: str, mark: str = "<|python_tag|>") -> list[ToolCall]:
    """JSON objects of a name and arguments, or a list of them: at the start, or after a mark.

    Llama 3 writes ``<|python_tag|>`` before them, or nothing. Without a mark, JSON of something
    else is an answer, and so is JSON that follows a text. What follows a call is not read.

    >>> [call.name for call in read_bare('{"name": "f", "parameters": {}}')]
    ['f']

    Args:
        text: the turn.
        mark: what precedes each call, or each list of calls.
    """
    _, *pieces = text.split(mark)
    if pieces:
        return [call for piece in pieces for call in _read_values(piece)]
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].lstrip()
    if not text.startswith(("{", "[")) or not any(f'"{key}"' in text for key in _ARGUMENTS):
        return []
    calls = _read_values(text)
    begins = text.lstrip("[{ \t\r\n").startswith(('"name"', '"tool_name"', '"function"', '"type"'))
    return calls if begins or any(call.name for call in calls) else []


def read_marked(text: str, mark: str, separator: str) -> list[ToolCall]:
    """``mark name separator {...}``, as DeepSeek and Kimi write them; ``:0`` is of no name.

    >>> read_marked('<|call|>f<|sep|>{"a": 1}<|end|>', "<|call|>", "<|sep|>")[0].arguments
    {'a': 1}
    """
    calls: list[ToolCall] = []
    for piece in text.split(mark)[1:]:
        name, found, rest = piece.partition(separator or "{")
        name, rest = name.partition(":")[0].strip(), rest if separator else found + rest
        try:
            value, _ = _JSON.raw_decode(rest, _after_blanks(rest, 0))
        except (ValueError, RecursionError) as error:
            calls.append(_bad(f"the arguments of {shown(name)} are no JSON", error))
        else:
            calls.append(ToolCall(name, value))
    return calls


def _read_values(text: str) -> list[ToolCall]:
    """The calls at the start of a text, as JSON objects or lists; at least one."""
    calls: list[ToolCall] = []
    place = _after_blanks(text, 0)
    while text[place : place + 1] in ("{", "["):
        try:
            value, place = _JSON.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            return [*calls, _bad(_NO_CALL, error)]
        calls += [call_of(each) for each in (value if isinstance(value, list) else [value])]
        place = _after_blanks(text, place)
    return calls or [ToolCall(error=_NO_CALL)]


def _after_blanks(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    return place if found is None else found.end()
