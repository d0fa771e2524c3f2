"""Checks that settings share: each raises ``ConfigError`` with the value and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sdp_lightning.errors import ConfigError

T = TypeVar("T")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a value that is not an integer, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {_shown(value)}.")


_WORDS = {
    bool: "true or false",
    int: "an integer of at most 63 bits",
    float: "a number",
    str: "a text",
}


def check_types(settings: object) -> None:
    """Refuse a setting whose value is not of its type, or not one of its ``Literal`` choices.

    An integer is a number, too; True is neither. Types other than these, texts, None and sequences
    of them are not checked.
    """
    for name, kinds in _types(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(kinds[0]) is Literal:
            one_of(name, value, get_args(kinds[0]))
        elif not any(_is(value, kind) for kind in kinds):
            words = " or ".join(map(_words, kinds))
            raise ConfigError(f"{name} must be {words}, got {_shown(value)}.")


@cache
def _types(settings: type) -> dict[str, tuple[Any, ...]]:
    """The types that a field's value may have, of each field that is checked."""
    hints = {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for name, hint in get_type_hints(settings).items()
    }
    return {
        name: kinds
        for name, kinds in hints.items()
        if get_origin(hints[name][0]) is Literal or all(map(_is_known, kinds))
    }


def _is_known(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return True
    parts = get_args(kind) if get_origin(kind) is tuple else (kind,)
    return all(part in (*_WORDS, type(None), ...) for part in parts)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        size = {len(value)} if isinstance(value, tuple | list) else set[int]()
        fits = size == {len(parts)} or (size and ... in parts)
        return bool(fits) and all(_is(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and value.bit_length() > 63:
        return False
    return isinstance(value, Real if kind is float else kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a sequence ({_WORDS[get_args(kind)[0]]} each)"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _WORDS.get(kind, "None")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {_shown(value)}.")


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return f"one of type {type(value).__name__}"


def positive(name: str, value: float) -> None:
    """Refuse what is not above 0; NaN is not."""
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}.")


def not_negative(name: str, value: float) -> None:
    """Refuse what is below 0, or NaN."""
    if not value >= 0:
        raise ConfigError(f"{name} must not be negative, got {value}.")


def config_from(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of settings from values by field name; names of no field are ignored.

    Raises:
        ConfigError: if a value is refused.
        TypeError: if a required field is missing, or a value has a type that cannot be compared.
    """
    names = {field.name for field in fields(cast(Any, kind))}
    return kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    )
