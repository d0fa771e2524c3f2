"""Answers of servers, changed at random: other values, types, depths and bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 3.0, 3.7, -0.5, 2.0, 10**6, 10**30, -(10**30), 1e300, -1e300),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "3", "-0.5", "7", "\ud800", "\x1b[31m"),
    *("\x00", "x" * 5000, [], {}, [[]], [None], {"": None}, ["x"], [1, 2, 3], {"type": "stop"}),
]
TAILS = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\x00",
    b"]",
    b"}",
    b'"',
    b",",
    b"",
]


def mutated(answer: Any, dice: random.Random) -> bytes:
    """The bytes of ``answer`` after one to three changes."""
    changed = copy.deepcopy(answer)
    for _ in range(dice.randint(1, 3)):
        changed = _change_value(changed, dice)
    data = json.dumps(changed, ensure_ascii=dice.random() < 0.5).encode(errors="surrogatepass")
    return _change_bytes(data, dice) if dice.random() < 0.3 else data


def _change_value(value: Any, dice: random.Random) -> Any:
    """``value`` with one part changed, deep down more often than at its top."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.1:
        return _nested(dice) if dice.random() < 0.05 else copy.deepcopy(dice.choice(ODD))
    key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = dice.random()
    if action < 0.1:
        del value[key]
    elif action < 0.2 and isinstance(value, list):
        value.insert(key, copy.deepcopy(value[key]))
    else:
        value[key] = _change_value(value[key], dice)
    return value


def _nested(dice: random.Random) -> Any:
    value: Any = None
    for _ in range(dice.choice([10, 100, 400])):  # as deep as json writes
        value = [value] if dice.random() < 0.5 else {"a": value}
    return value


def _change_bytes(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data) + 1)
    tail = dice.choice(TAILS)
    match dice.randrange(4):
        case 0:
            return data[:place] + tail
        case 1:
            return data[:place] + tail + data[place:]
        case 2:
            return data[:place] + bytes([dice.randrange(256)]) + data[place + 1 :]
        case _:
            return data.decode(errors="replace").encode("utf-16")
