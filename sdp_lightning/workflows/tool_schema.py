"""What a tool is called, what it may be given, and what is wrong with the arguments of a call.

A tool is any callable. Its description is a JSON schema in the form that chat templates take.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from sdp_lightning.errors import ConfigError
from sdp_lightning.workflows.environment import shown
from sdp_lightning.workflows.tool_calls import read_json

Tool = Callable[..., object]
Schema = Mapping[str, Any]

_FITS: Mapping[str, Callable[[Any], bool]] = {  # types of JSON
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, Mapping),
}
_WORDS = {"true": True, "false": False, "none": None}  # as Python writes them, in lower case
_JSON_TYPES = (int, float, str, bool, list, tuple, dict, type(None))
_SCHEMAS: weakref.WeakKeyDictionary[Any, Schema] = weakref.WeakKeyDictionary()  # of functions


def tool_name(tool: Tool) -> str:
    """The name by which a tool is called: its own, else that of its function or its class."""
    # foreign: a callable may have no name
    while isinstance(tool, functools.partial) and getattr(tool, "__name__", None) is None:
        tool = tool.func
    # foreign: a callable may have no name
    return str(getattr(tool, "__name__", type(tool).__name__))


def tool_schema(tool: Tool) -> Schema:
    """The JSON schema of a tool, as ``apply_chat_template(tools=[...])`` takes it.

    It is that of ``transformers.utils.get_json_schema``, except that the docstring need not name
    the arguments, and that an argument without a type may be anything. What a ``functools.partial``
    has bound by name is no argument.

    Raises:
        ConfigError: if the signature is not known, an argument cannot be given by name, or its type
            has no form in JSON.
    """
    function = tool.__func__ if inspect.ismethod(tool) else tool
    if not inspect.isfunction(function):
        return _make_schema(tool)
    if function not in _SCHEMAS:
        _SCHEMAS[function] = _make_schema(tool)
    return _SCHEMAS[function]


def read_arguments(schema: Schema, given: Any, *, are_texts: bool = False) -> dict[str, Any]:
    """The arguments of a call, as the tool takes them.

    Args:
        schema: schema of the tool.
        given: the arguments by name.
        are_texts: whether each is a text that stands for its value: ``"7"`` is 7, unless the tool
            takes a text.

    Raises:
        TypeError: if one is missing, unknown or of a wrong type; the text names it.
    """
    name, about = schema["function"]["name"], schema["function"]["parameters"]
    known: Mapping[str, Schema] = about["properties"]
    if missing := [key for key in about.get("required", ()) if key not in given]:
        raise TypeError(f"{name}() needs {missing[0]!r}, which is missing")
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known and not about.get("additionalProperties"):
            raise TypeError(f"{name}() has no parameter {shown(key)}; it has {list(known)}")
        allowed = known.get(key, {})
        arguments[key] = _said(value, allowed) if are_texts else value
        if wrong := _why_not(arguments[key], allowed, key):
            raise TypeError(f"{name}() cannot take that: {wrong}")
    return arguments


def _said(text: str, allowed: Schema) -> Any:
    """The value that a text stands for, or the text."""
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        value = _WORDS.get(text.strip().lower(), text)
    return text if isinstance(value, str) or _why_not(value, allowed, "") else value


def _why_not(value: Any, allowed: Schema, place: str) -> str:
    """Why a schema does not allow a value, naming the place in it; empty if it does."""
    if value is None and allowed.get("nullable"):
        return ""
    if options := allowed.get("anyOf"):
        reasons = [_why_not(value, option, place) for option in options]
        return "" if "" in reasons else " and ".join(dict.fromkeys(reasons))
    kinds = allowed.get("type") or ()
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_FITS[kind](value) for kind in kinds if kind in _FITS):
        return f"{place!r} must be of type {' or '.join(kinds)}, and is {shown(value)}"
    if "enum" in allowed and value not in allowed["enum"]:
        return f"{place!r} must be one of {allowed['enum']}, and is {shown(value)}"
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, list):
        fixed = allowed.get("prefixItems")
        if fixed is not None and len(fixed) != len(value):
            return f"{place!r} must have {len(fixed)} items, and has {len(value)}"
        every = allowed.get("items")
        parts = list(zip(value, fixed or [every] * (len(value) if every else 0), strict=False))
    elif isinstance(value, Mapping) and isinstance(allowed.get("additionalProperties"), Mapping):
        parts = [(part, allowed["additionalProperties"]) for part in value.values()]
    return next(filter(None, (_why_not(part, each, place) for part, each in parts)), "")


# Schemas ------------------------------------------------------------------------------------------


def _make_schema(tool: Tool) -> Schema:
    from transformers.utils.chat_template_utils import (
        TypeHintParsingException,
        get_json_schema,
        parse_google_format_docstring,
    )

    name, core = tool_name(tool), _core(tool)
    try:
        hints = get_type_hints(core.__init__ if inspect.isclass(core) else core)
        parameters, takes_any = _parameters(tool, hints)
        purpose, said, _ = parse_google_format_docstring(docs := _docs(tool, core))
        said = said or {}
        lines = [f"    {each.name}: {said.get(each.name) or '-'}" for each in parameters]
        schema = get_json_schema(_stand_in(name, "\n".join(("-", "Args:", *lines)), parameters))
    except (TypeError, ValueError, NameError, AttributeError, TypeHintParsingException) as error:
        why = " ".join(map(str, error.args))
        raise ConfigError(f"the tool {name!r} cannot be described in JSON: {why}") from error
    about = schema["function"]
    is_whole = all(each.name in said for each in parameters)
    about["description"] = (purpose if is_whole else docs) or ""
    for key in set(about["parameters"]["properties"]) - set(said):
        del about["parameters"]["properties"][key]["description"]
    if takes_any:
        about["parameters"]["additionalProperties"] = True
    return schema


def _core(tool: Tool) -> Any:
    """What has the signature, the types and the docstring of a tool."""
    while isinstance(tool, functools.partial):
        tool = tool.func
    if not inspect.isroutine(tool) and not inspect.isclass(tool):
        tool = type(tool).__call__  # pyright: ignore[reportFunctionMemberAccess]
    if inspect.isgeneratorfunction(tool) or inspect.isasyncgenfunction(tool):
        raise ConfigError(f"the tool {tool!r} yields: let it return what the policy shall read.")
    return tool


def _docs(tool: Tool, core: Any) -> str:
    while isinstance(tool, functools.partial) and tool.__doc__ == functools.partial.__doc__:
        tool = tool.func
    is_object = not inspect.isroutine(tool) and not inspect.isclass(tool)
    docs = core.__doc__ if is_object and not isinstance(tool, functools.partial) else None
    return inspect.cleandoc(docs) if docs else inspect.getdoc(tool) or ""


def _parameters(tool: Tool, hints: Mapping[str, Any]) -> tuple[list[inspect.Parameter], bool]:
    """The parameters that a call may name, with types of JSON; and whether it may name others."""
    bound: set[str] = set()
    core = tool
    while isinstance(core, functools.partial):
        bound |= set(core.keywords)
        core = core.func
    found, takes_any = list[inspect.Parameter](), False
    for each in inspect.signature(tool).parameters.values():
        takes_any = takes_any or each.kind is each.VAR_KEYWORD
        if each.kind is each.POSITIONAL_ONLY and each.default is each.empty:
            raise TypeError(f"its parameter {each.name!r} cannot be given by name.")
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in bound:
            hint = _json_hint(hints.get(each.name, Any))
            found.append(each.replace(kind=each.KEYWORD_ONLY, annotation=hint))
    return found, takes_any


def _json_hint(hint: Any) -> Any:
    """A type whose schema is that of the JSON which is given for it; Any where there is none."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Literal or (kind in _JSON_TYPES and not parts):
        return hint
    if kind in (Union, UnionType):
        return Union[tuple(map(_json_hint, parts))]  # noqa: UP007
    if kind is tuple and ... not in parts:
        return tuple[tuple(map(_json_hint, parts))]
    if not inspect.isclass(kind) or is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return hint
    if kind is tuple or (kind is not object and issubclass(list, kind)):
        return list[_json_hint(parts[0])] if parts else list
    if kind is not object and issubclass(dict, kind):
        return dict[parts[0], _json_hint(parts[1])] if len(parts) == 2 else dict
    return hint if parts else Any


def _stand_in(name: str, docs: str, parameters: list[inspect.Parameter]) -> Tool:
    """A function that looks like the tool, for what reads functions."""

    def tool() -> None: ...

    tool.__name__, tool.__doc__ = name, docs
    tool.__annotations__ = {each.name: each.annotation for each in parameters}
    setattr(tool, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return tool
