"""Several rewards of a completion, as files and worker processes name them."""

from __future__ import annotations

import os
from typing import Any


def correct(completion: str, row: Any) -> float:
    return float("4" in completion)


def form(completion: str, row: Any) -> float:
    return float(completion.startswith("+"))


def both(completion: str, row: Any) -> dict[str, float]:
    return {"correct": correct(completion, row), "form": form(completion, row)}


def both_of_group(completions: list[str], row: Any) -> dict[str, list[float]]:
    named = [both(each, row) for each in completions]
    return {name: [each[name] for each in named] for name in named[0]}


def both_or_die(completion: str, row: Any) -> dict[str, float]:
    if completion == "9":
        os._exit(3)
    return both(completion, row)


def rank(completions: list[str], row: Any, group_index: list[int]) -> list[float]:
    return [float(index) for index in group_index]
