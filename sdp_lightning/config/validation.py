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


def positive(name: str, value: float) -> None:
    """Refuse what is not above 0; NaN is not."""
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}.")


def not_negative(name: str, value: float) -> None:
    """Refuse what is below 0, or NaN."""
    if not value >= 0:
        raise ConfigError(f"{name} must not be negative, got {value}.")
