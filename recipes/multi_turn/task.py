"""A game that answers back: find a hidden digit in four guesses, told ``up`` or ``down``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import sdp_lightning as sdp

PROMPT = "0-9?\n"
MAX_GUESSES = 4


class UpOrDown(sdp.Environment):
    r"""Answers each guess with the direction of the hidden digit; reward 1.0 for finding it.

    >>> game = UpOrDown()
    >>> game.reset({"secret": 7})
    '0-9?\n'
    >>> [game.step(guess)[0] for guess in ("5\n", "9\n", "x\n")]
    ['up', 'down', 'no']
    >>> game.step("7\n")
    StepResult(observation='', reward=1.0, done=True)
    """

    def reset(self, row: Mapping[str, Any]) -> str:
        self._secret = int(row["secret"])
        return PROMPT

    def step(self, completion: str) -> sdp.StepResult:
        guess = completion.removesuffix("\n")
        if len(guess) != 1 or not guess.isdigit():
            return sdp.StepResult("no")
        if int(guess) == self._secret:
            return sdp.StepResult(reward=1.0, done=True)
        return sdp.StepResult("up" if int(guess) < self._secret else "down")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Games with their hidden digits.

    >>> make_rows(1, seed=1)
    [{'id': 'game-0', 'secret': 1}]
    """
    digits = random.Random(seed).choices(range(10), k=count)
    return [{"id": f"game-{index}", "secret": digit} for index, digit in enumerate(digits)]


rows = make_rows(1024, seed=1)
val_rows = [{"id": f"digit-{digit}", "secret": digit} for digit in range(10)] * 5


def play(player: random.Random, junk: float) -> list[tuple[str, bool]]:
    """A game as (text, whether the player wrote it), of a player who uses every answer.

    In a share ``junk`` of the turns the player writes a letter instead of a digit.
    """
    game, secret = UpOrDown(), player.randrange(10)
    parts = [(game.reset({"secret": secret}), False)]
    low, high = 0, 9
    for _ in range(MAX_GUESSES):
        writes_junk = player.random() < junk
        guess = player.choice("abcdef") if writes_junk else str(player.randint(low, high))
        parts.append((f"{guess}\n", True))
        answer, _, done = game.step(f"{guess}\n")
        if done:
            break
        parts.append((f"{answer}\n", False))
        low = int(guess) + 1 if answer == "up" else low
        high = int(guess) - 1 if answer == "down" else high
    return parts
