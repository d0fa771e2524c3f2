"""Rows of a stream in a checkpoint: types that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from sdp_lightning.errors import RolloutError

_ARRAY = "__numpy__"  # key of an array or a scalar of numpy


def encode(value: Any, where: str) -> Any:
    """``value`` in plain types and tensors, which are copies.

    Args:
        value: None, a text, a number, bytes, an array, a tensor, or mappings, lists and tuples of
            them.
        where: name of ``value`` in an error.

    Raises:
        RolloutError: if it is, or holds, anything else; names it and the remedy.
    """
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if isinstance(value, Mapping):
        items = cast(Mapping[object, Any], value).items()
        return {_key(key, where): encode(item, f"{where}[{key!r}]") for key, item in items}
    if isinstance(value, list | tuple):
        parts = [encode(item, f"{where}[{i}]") for i, item in enumerate(cast(list[Any], value))]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, str):  # a subclass, such as one of numpy
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        try:
            return {_ARRAY: torch.tensor(value)}
        except TypeError:  # an array of texts or objects
            pass
    elif isinstance(value, int | float):  # an enum
        return int(value) if isinstance(value, int) else float(value)
    raise RolloutError(
        f"{where} is {type(value).__name__}, which a checkpoint cannot hold while the row is in "
        "flight: make it text, numbers, bytes, arrays, lists or mappings of these, or give the "
        "prompts as a sequence."
    )


def decode(value: Any) -> Any:
    """What :func:`encode` was given; mappings are dicts."""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value)
        if items.keys() == {_ARRAY}:
            return items[_ARRAY].numpy()[()]
        return {key: decode(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        parts = [decode(item) for item in cast(Sequence[Any], value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _key(key: object, where: str) -> str | int:
    if type(key) in (str, int):
        return cast("str | int", key)
    raise RolloutError(f"{where} has the key {key!r}: keys of rows must be texts.")
