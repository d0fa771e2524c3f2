"""Finished groups that wait: a queue between the threads, a cache on the trainer's side.

Both keep groups in the order of their creation, and return the groups that they drop.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Collection, Sequence

from sdp_lightning.errors import ConfigError
from sdp_lightning.types import TrajectoryGroup


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
        """Insert ``group``; False if the queue is full."""
        with self._lock:
            if len(self._groups) >= self.maxsize:
                return False
            bisect.insort(self._groups, group, key=lambda g: g.order)
            return True

    def drain(self) -> list[TrajectoryGroup]:
        """Remove and return all groups, oldest first."""
        with self._lock:
            groups, self._groups = self._groups, []
            return groups

    def remove(self, orders: Collection[int]) -> list[TrajectoryGroup]:
        """Remove and return those of these groups that wait here, oldest first."""
        with self._lock:
            return _remove(self._groups, orders)

    def snapshot(self) -> list[TrajectoryGroup]:
        """The waiting groups, oldest first."""
        with self._lock:
            return list(self._groups)


class RolloutCache:
    """Groups on the trainer's side of the queue, oldest first. One thread uses it at a time."""

    def __init__(self) -> None:
        self._groups: list[TrajectoryGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Insert ``groups`` in the order of creation."""
        for group in groups:
            bisect.insort(self._groups, group, key=lambda g: g.order)

    def remove(self, orders: Collection[int]) -> list[TrajectoryGroup]:
        """Remove and return those of these groups that wait here, oldest first."""
        return _remove(self._groups, orders)

    def take(self, count: int, *, fewer: bool = False) -> list[TrajectoryGroup]:
        """Remove and return the ``count`` oldest groups; none, or ``fewer``, if there are fewer."""
        if len(self._groups) < count and not fewer:
            return []
        taken = self._groups[:count]
        del self._groups[:count]
        return taken

    def first(self, count: int) -> list[TrajectoryGroup]:
        """The ``count`` oldest groups, or as many as there are; they stay."""
        return self._groups[:count]

    def snapshot(self) -> list[TrajectoryGroup]:
        """The waiting groups, oldest first."""
        return list(self._groups)


def _remove(groups: list[TrajectoryGroup], orders: Collection[int]) -> list[TrajectoryGroup]:
    """Looks at the groups from the first to the last of ``orders`` only: mostly the oldest ones."""
    if not orders:
        return []
    begin = bisect.bisect_left(groups, min(orders), key=lambda group: group.order)
    end = bisect.bisect_right(groups, max(orders), key=lambda group: group.order)
    part = groups[begin:end]
    groups[begin:end] = [group for group in part if group.order not in orders]
    return [group for group in part if group.order in orders]
