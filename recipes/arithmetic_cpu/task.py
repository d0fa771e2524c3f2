"""One-digit addition, few-shot: 81 rows, and a reward of 1 for the right number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPT = "1+2=3\n4+5=9\n{a}+{b}="

rows = [
    {"prompt": PROMPT.format(a=a, b=b), "answer": str(a + b)}
    for a in range(1, 10)
    for b in range(1, 10)
]
some_rows = rows[::3]


def reward(completion: str, row: Mapping[str, Any]) -> float:
    r"""1.0 if what was written before the newline is exactly the sum.

    >>> reward("12\n", {"answer": "12"}), reward("12+1", {"answer": "12"})
    (1.0, 0.0)
    """
    return float(completion.partition("\n")[0].strip() == row["answer"])
