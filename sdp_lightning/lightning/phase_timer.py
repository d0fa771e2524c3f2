"""The present phase of the trainer's thread, and the seconds that it spent in each."""

from __future__ import annotations

import time

PHASES = ("wait", "score", "train", "publish", "evaluate")


class PhaseTimer:
    """The phase of a run: written by the trainer's thread, read by any.

    Every moment belongs to one phase, ``"rest"`` if to none of ``PHASES``, so the phases add up to
    the whole time.
    """

    def __init__(self) -> None:
        self._now = ("rest", time.monotonic())
        self._spent: dict[str, float] = {}

    @property
    def now(self) -> tuple[str, float]:
        """The present phase and its seconds so far."""
        phase, since = self._now
        return phase, time.monotonic() - since

    def enter(self, phase: str) -> None:
        """Begin ``phase``."""
        before, since = self._now
        self._now = (phase, now := time.monotonic())
        self._spent[before] = self._spent.get(before, 0.0) + now - since

    def take_spent(self) -> dict[str, float]:
        """Seconds in every phase since the last call. The present phase goes on."""
        self.enter(self._now[0])
        spent, self._spent = self._spent, {}
        return spent
