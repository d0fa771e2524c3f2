"""API keys of servers: where a setting says that the key is, and settings without the key itself.

``api_key`` is ``env:NAME`` (an environment variable), ``file:PATH``, or the key. The key itself
never goes into what a run writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdp_lightning.errors import ConfigError

KEY_VARIABLE = "SDP_API_KEY"
_ENV, _FILE = "env:", "file:"
_NAME = "api_key"
_END = r"['\"\s,}]|$"
_IN_TEXT = re.compile(
    rf"({_NAME}['\"]?\s*[:=]\s*)(?!['\"]?(?:(?:None|null)(?:{_END})|{_ENV}|{_FILE}))"
    r"(?:(['\"]).*?\2|['\"]?[^'\"\s,}]+)",
    re.DOTALL,
)


def key_source(setting: str | None) -> str:
    """Name in errors of where :func:`read_key` finds a key: ``api_key`` if it is the key itself."""
    if setting is None:
        return KEY_VARIABLE
    is_elsewhere = isinstance(setting, str) and setting.startswith((_ENV, _FILE))
    return setting if is_elsewhere else _NAME


def read_key(setting: str | None) -> str | None:
    """The key that ``setting`` names, else that of ``SDP_API_KEY``; None without either.

    Raises:
        ConfigError: if the variable is not set, the file cannot be read, or there is no key in it.
    """
    if setting is None:
        return os.environ.get(KEY_VARIABLE) or None
    if setting.startswith(_ENV):
        key = os.environ.get(setting.removeprefix(_ENV), "")
        why = "that variable is not set"
    elif setting.startswith(_FILE):
        try:
            key, why = (
                Path(setting.removeprefix(_FILE)).expanduser().read_text().strip(),
                "it is empty",
            )
        except (OSError, UnicodeDecodeError) as error:
            key, why = "", str(error)
    else:
        key, why = setting, "it is empty"
    if not key:
        raise ConfigError(
            f"there is no key in api_key={setting!r}: {why}. Set the variable, or name another by "
            "env:NAME or a file by file:PATH. What a run saves of its settings names "
            f"{_ENV}{KEY_VARIABLE} in place of a key."
        )
    return key


def without_keys(value: Any, name: str = "") -> Any:
    """A copy of ``value``, of the setting ``name``, in which each ``api_key`` names a variable."""
    if isinstance(value, Mapping):
        return {key: without_keys(inner, key) for key, inner in value.items()}  # type: ignore
    if isinstance(value, list | tuple):
        return type(value)(without_keys(inner) for inner in value)  # type: ignore
    is_key = name == _NAME and isinstance(value, str) and not value.startswith((_ENV, _FILE))
    return f"{_ENV}{KEY_VARIABLE}" if is_key else value


def hide_keys(text: str) -> str:
    """``text`` with three dots in place of a key that follows ``api_key`` and ``:`` or ``=``.

    >>> hide_keys("{'api_key': 'sk-1', 'stream': True}")
    "{'api_key': '...', 'stream': True}"
    >>> hide_keys("api_key=env:SDP_API_KEY")
    'api_key=env:SDP_API_KEY'
    """
    return _IN_TEXT.sub(r"\1\2...\2", text)
