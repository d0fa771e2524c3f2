"""Where finished groups wait: a queue across the thread, a cache on the trainer's side.

Both keep groups in the order of their creation, and give back what they drop.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence

from sdp_lightning.errors import ConfigError
from sdp_lightning.types import TrajectoryGroup

IsStale = Callable[[TrajectoryGroup], bool]


class RolloutQueue:
    """A bounded queue from the rollout thread to the trainer's; no call ever blocks or loses.

    A full queue answers ``put`` with False: the producer keeps the group and offers it again.
    """

    def __init__(self, maxsize: int) -> None:
        if maxsize < 1:
            raise ConfigError(f"a RolloutQueue must hold at least 1 group, got maxsize={maxsize}.")
        self.maxsize = maxsize
        self._groups: list[TrajectoryGroup] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._groups)

    def put(self, group: TrajectoryGroup) -> bool:
        """Take ``group`` in, unless full."""
        with self._lock:
            if len(self._groups) >= self.maxsize:
                return False
            bisect.insort(self._groups, group, key=lambda g: g.order)
            return True

    def drain(self) -> list[TrajectoryGroup]:
        """Take everything out, oldest first."""
        with self._lock:
            groups, self._groups = self._groups, []
            return groups

    def purge(self, is_stale: IsStale) -> list[TrajectoryGroup]:
        """Take the stale groups out; the others keep their places."""
        with self._lock:
            dropped, self._groups = _split(self._groups, is_stale)
            return dropped

    def snapshot(self) -> list[TrajectoryGroup]:
        """What waits, oldest first."""
        with self._lock:
            return list(self._groups)


class RolloutCache:
    """Groups on the trainer's side of the queue, oldest first. One thread uses it at a time."""

    def __init__(self) -> None:
        self._groups: list[TrajectoryGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Take ``groups`` in, each at its place by creation."""
        for group in groups:
            bisect.insort(self._groups, group, key=lambda g: g.order)

    def purge(self, is_stale: IsStale) -> list[TrajectoryGroup]:
        """Take the stale groups out; the others keep their places."""
        dropped, self._groups = _split(self._groups, is_stale)
        return dropped

    def take(self, count: int) -> list[TrajectoryGroup]:
        """The ``count`` oldest groups, removed; none at all if there are fewer."""
        if len(self._groups) < count:
            return []
        taken, self._groups = self._groups[:count], self._groups[count:]
        return taken

    def snapshot(self) -> list[TrajectoryGroup]:
        """What waits, oldest first."""
        return list(self._groups)


def _split(
    groups: list[TrajectoryGroup], is_stale: IsStale
) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup]]:
    verdicts = [is_stale(group) for group in groups]
    return (
        [group for group, stale in zip(groups, verdicts, strict=True) if stale],
        [group for group, stale in zip(groups, verdicts, strict=True) if not stale],
    )
