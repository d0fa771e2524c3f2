"""Indices over the groups in flight, kept as groups change: no commit looks at all of them.

Pure bookkeeping, in numbers of groups (``order``); its owner locks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class LookTimes:
    """The policy version from which on each group has to be looked at again.

    ``due(version)`` costs as much as the groups that it returns, however many others there are.
    """

    def __init__(self) -> None:
        self._version_of: dict[int, int] = {}
        self._orders_at: dict[int, set[int]] = {}

    def set(self, order: int, version: int | None) -> None:
        """Look at a group at ``version``, not when it was said before; None: never."""
        self.discard(order)
        if version is not None:
            self._version_of[order] = version
            self._orders_at.setdefault(version, set()).add(order)

    def discard(self, order: int) -> None:
        """Never look at a group again; nothing if it was not to be looked at."""
        version = self._version_of.pop(order, None)
        if version is None:
            return
        self._orders_at[version].discard(order)
        if not self._orders_at[version]:
            del self._orders_at[version]

    def due(self, version: int) -> list[int]:
        """The groups to look at by ``version``, in order of creation."""
        versions = [each for each in self._orders_at if each <= version]
        return sorted(order for each in versions for order in self._orders_at[each])


class Untrained:
    """The groups that the trainer does not have yet: how many of each version, and which run.

    Groups are added in the order of their creation, so the first one that runs is the oldest.
    """

    def __init__(self) -> None:
        self._created: dict[int, int] = {}
        self._counts: Counter[int] = Counter()
        self._running: OrderedDict[int, None] = OrderedDict()

    def add(self, order: int, created_version: int, *, runs: bool) -> None:
        """A group created at this version; one that is there already has another version now."""
        self._count_out(order)
        self._created[order] = created_version
        self._counts[created_version] += 1
        if runs:
            self._running.setdefault(order)

    def on_finished(self, order: int) -> None:
        """A group does not run any more, and waits."""
        self._running.pop(order, None)

    def discard(self, order: int) -> None:
        """A group was taken, or is gone."""
        self._count_out(order)
        self._running.pop(order, None)

    @property
    def oldest_running(self) -> int | None:
        """The oldest group that runs."""
        return next(iter(self._running), None)

    def exceed(
        self,
        per_batch: int,
        taken: Iterable[int],
        next_version: int,
        stale_from: Callable[[int], int | None],
    ) -> bool:
        """Whether more groups go stale than later batches can take, once ``taken`` are gone.

        Args:
            per_batch: groups that each batch takes. The first one is trained at ``next_version``,
                so j versions later at most ``j * per_batch`` of the groups may be stale.
            taken: groups of the batch before.
            next_version: version of the first of these batches.
            stale_from: first version at which a group created at a version is stale; rises with it.
        """
        without = Counter(self._created[order] for order in taken)
        so_far = 0
        for created in sorted(self._counts):
            so_far += self._counts[created] - without[created]
            stale_at = stale_from(created)
            if stale_at is None:
                return False
            if so_far > max(0, stale_at - next_version) * per_batch:
                return True
        return False

    def _count_out(self, order: int) -> None:
        created = self._created.pop(order, None)
        if created is None:
            return
        self._counts[created] -= 1
        if not self._counts[created]:
            del self._counts[created]
