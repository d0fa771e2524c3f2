"""Copies of dataset rows: what a reward or an environment changes is its own."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from sdp_lightning.rewards.timeouts import call_aside_if_long

logger = logging.getLogger(__name__)

T = TypeVar("T")
_FIXED = (str, int, float, bool, bytes, type(None))  # values that nobody can change


async def own_copy(value: T) -> T:
    """A deep copy of ``value``, a row or a part of one; a long one is copied in a thread.

    A value in a row that cannot be copied, such as a lock, is shared, with one warning for its key.
    """
    row: Any = value
    if type(row) is dict and all(type(item) in _FIXED for item in row.values()):
        return cast(T, dict(row))  # pyright: ignore[reportUnknownArgumentType]
    return await call_aside_if_long("copying a row", value, _deep_copy, value)


def _deep_copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except (TypeError, copy.Error):
        if not isinstance(value, Mapping):
            raise
    memo: dict[int, Any] = {}
    row: Mapping[object, object] = value
    return {key: _copy_or_share(key, item, memo) for key, item in row.items()}


def _copy_or_share(key: object, value: object, memo: dict[int, Any]) -> object:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, copy.Error) as error:
        _warn(str(key), type(value).__name__, str(error))
        return value


@functools.cache
def _warn(key: str, kind: str, error: str) -> None:
    logger.warning(
        "the %s under %r of a row cannot be copied (%s): all samples share it.", kind, key, error
    )
