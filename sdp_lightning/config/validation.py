"""Checks that settings share: each raises ``ConfigError`` with the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from sdp_lightning.errors import ConfigError

T = TypeVar("T")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a value that is not an integer, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_choices(settings: object) -> None:
    """Refuse a setting that is annotated as ``Literal`` and has none of its values."""
    for name, choices in _choices(type(settings)).items():
        one_of(name, getattr(settings, name), choices)


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(kind).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


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
