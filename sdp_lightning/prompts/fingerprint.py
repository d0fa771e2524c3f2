"""Digests of dataset rows, by content: equal rows have equal ones in every process.

The order of keys does not matter, nor whether a sequence is a list or a tuple.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy as np

from sdp_lightning.errors import RolloutError
from sdp_lightning.prompts.checks import KeptRows

SAMPLED = 128  # rows that are read of a sequence whose rows are made when they are read
_CHUNK = 1000  # rows of a datasets.Dataset, which is much faster by columns


def digest(value: object, before: str = "") -> str:
    """Digest of ``value``, a row, in a chain that begins with the digest ``before``."""
    return blake2b(before.encode() + _text(value).encode(), digest_size=16).hexdigest()


def fingerprint(rows: Sequence[object]) -> str:
    """Digest of the number of ``rows`` and of their content.

    All rows of a list, a tuple or a ``datasets.Dataset`` count, about 1 s for 100,000 short ones.
    Of another sequence, whose rows may be costly to read, 128 count that are evenly spaced, with
    the first and the last.

    Raises:
        RolloutError: if a row cannot be read.
    """
    whole = blake2b(str(len(rows)).encode(), digest_size=16)
    try:
        for row in _rows_that_count(rows):
            whole.update(_text(row).encode())
    except Exception as error:
        raise RolloutError(f"reading the prompts failed: {error!r}") from error
    return whole.hexdigest()


def _rows_that_count(rows: Sequence[object]) -> Iterator[object]:
    if isinstance(rows, KeptRows):
        yield list(rows.indices)
        yield from _rows_that_count(rows.rows)
    elif isinstance(rows, list | tuple):
        yield from rows
    elif type(rows).__module__.startswith("datasets."):
        for start in range(0, len(rows), _CHUNK):
            columns = cast(Mapping[str, Sequence[Any]], rows[start : start + _CHUNK])
            names = list(columns)
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(names, values, strict=True))
    else:
        last, count = len(rows) - 1, min(SAMPLED, len(rows))
        for number in range(count):
            yield rows[number * last // max(1, count - 1)]


def _text(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    except TypeError:  # keys that are no texts, or not all of a kind
        return json.dumps(_by_text(value), sort_keys=True, default=_plain)


def _by_text(value: Any) -> Any:
    """``value`` with the texts of all keys."""
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {f"{type(key).__name__} {key}": _by_text(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_by_text(item) for item in cast(Sequence[object], value)]
    return value


def _plain(value: Any) -> Any:
    """What JSON can say of a value that is none of its own types."""
    if isinstance(value, Mapping):
        return dict(cast(Mapping[object, object], value))
    if isinstance(value, bytes | bytearray):
        return {"bytes": blake2b(value, digest_size=16).hexdigest()}
    if isinstance(value, set | frozenset):
        return sorted(map(_text, cast(set[object], value)))
    if isinstance(value, np.generic):
        return value.item()
    # foreign: an array or an image of another library
    if hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__"):
        array = np.asarray(value)
        return [str(array.dtype), array.shape, _plain(array.tobytes())]
    text = repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return kind if " at 0x" in text else f"{kind} {text}"
