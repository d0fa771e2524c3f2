"""Rewards with the signatures of TRL's: lists of completions, and a list for each column."""

from __future__ import annotations

from typing import Any

CALLS: list[tuple[list[list[dict[str, str]]], list[str]]] = []  # of accuracy_reward


def accuracy_reward(
    completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any
) -> list[float | None]:
    """1 for a last letter that is in the solution's text, else 0."""
    CALLS.append((completions, solution))
    texts = [messages[0]["content"] for messages in completions]
    pairs = zip(texts, solution, strict=True)
    return [float(bool(text) and text[-1] in answer) for text, answer in pairs]


def reward_len(completions: list[str], **kwargs: Any) -> list[float]:
    """The number of letters, as in TRL's documentation."""
    return [float(len(completion)) for completion in completions]


def ground_truth_reward(
    completions: list[str], ground_truth: list[str], **kwargs: Any
) -> list[float]:
    """1 for a completion that is the column's text."""
    return [float(c == truth) for c, truth in zip(completions, ground_truth, strict=True)]
