"""Rewards that ask for more than completion and row; imported by worker processes."""

from __future__ import annotations

from typing import Any


def by_index(completion: str, row: Any, group_index: int) -> float:
    return 2.0 * (1 + group_index)


def shortest(completions: list[str], row: Any, token_ids: list[list[int]]) -> list[float]:
    assert [len(ids) for ids in token_ids] == [len(text) + 1 for text in completions]
    return [float(len(text) == min(map(len, completions))) for text in completions]
