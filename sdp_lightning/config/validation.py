"""Checks that settings share: each raises ``ConfigError`` with the value and the remedy."""

from __future__ import annotations

from sdp_lightning.errors import ConfigError


def at_least(name: str, value: int, least: int) -> None:
    """Refuse what is no integer, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
