"""Sorting six digits, character by character: ``503912=`` is answered ``012359`` and a newline."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

NUM_DIGITS = 6


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts with their answers.

    >>> make_rows(1, seed=0)
    [{'prompt': '874254=', 'answer': '244578'}]
    """
    generator = random.Random(seed)
    digits = ["".join(generator.choices("0123456789", k=NUM_DIGITS)) for _ in range(count)]
    return [{"prompt": f"{text}=", "answer": "".join(sorted(text))} for text in digits]


rows = make_rows(4096, seed=1)
val_rows = make_rows(64, seed=2)


def reward(completion: str, row: Mapping[str, Any]) -> float:
    r"""1.0 for exactly the sorted digits and then the end.

    >>> row = {"answer": "012359"}
    >>> reward("012359\n", row), reward("012359x\n", row), reward("01235\n", row)
    (1.0, 0.0, 0.0)
    """
    return float(completion.removesuffix("\n") == row["answer"])
