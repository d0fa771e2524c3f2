"""How many rollouts may start now, so that none of them is born stale.

Pure bookkeeping: no threads of its own, no clock, no engine. The unit is one group.

Words: ``running`` groups have not ended; ``pending`` ones were accepted and wait to be trained;
``accepted = pending + consumed + dropped`` never decreases.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sdp_lightning.errors import ConfigError, RolloutError


@dataclass(frozen=True)
class RolloutStat:
    """A snapshot of the ledger: ``submitted`` is the sum of the others at every instant."""

    submitted: int = 0
    running: int = 0
    pending: int = 0
    consumed: int = 0
    dropped: int = 0
    rejected: int = 0
    failed: int = 0

    @property
    def accepted(self) -> int:
        """Groups that finished and were queued: they wait, were trained or were dropped."""
        return self.pending + self.consumed + self.dropped


class CapacityModifier(Protocol):
    """Changes the staleness term of the capacity; it may lower it, and may read the manager."""

    def modify(self, staleness_bound: int, stat: RolloutStat) -> int:
        """The new staleness term, given the present one and a snapshot of the counters."""
        ...


class FilteredSamplesCapacityModifier:
    """Gives back the capacity of groups that were accepted and then dropped.

    ``accepted`` never decreases, so without this every dropped group would shrink the pipeline
    for good, and enough drops would stop it. The only credit there is, and a permanent one.
    """

    def modify(self, staleness_bound: int, stat: RolloutStat) -> int:
        return staleness_bound + stat.dropped


class StalenessManager:
    """The conserved ledger of groups, and the capacity that follows from it.

    With c the policy version, B = ``batch_size``, C = ``max_concurrent`` and H = ``max_head_lag``::

        capacity(c) = max(0, min(C - running, modifiers((H + c + 1) * B - (accepted + running))))

    Every ``on_*`` is one locked transition; one that would make a count negative raises
    ``RolloutError`` and changes nothing.

    Raises:
        ConfigError: if C < 1, B < 1 or H < 0: no group could ever start.
    """

    def __init__(
        self,
        *,
        max_concurrent: int,
        batch_size: int,
        max_head_lag: int,
        modifiers: Sequence[CapacityModifier] = (),
    ) -> None:
        if max_concurrent < 1 or batch_size < 1 or max_head_lag < 0:
            raise ConfigError(
                "StalenessManager needs max_concurrent >= 1, batch_size >= 1 and max_head_lag >= "
                f"0; got {max_concurrent}, {batch_size} and {max_head_lag}."
            )
        self.max_concurrent = max_concurrent
        self.batch_size = batch_size
        self.max_head_lag = max_head_lag
        self._modifiers = tuple(modifiers)
        self._stat = RolloutStat()
        self._lock = threading.Lock()

    @property
    def stat(self) -> RolloutStat:
        """The counters, all of the same instant."""
        return self._stat

    def capacity(self, version: int) -> int:
        """Number of groups that may start at policy version ``version``."""
        stat = self._stat
        bound = (self.max_head_lag + version + 1) * self.batch_size
        bound -= stat.accepted + stat.running
        for modifier in self._modifiers:
            bound = modifier.modify(bound, stat)
        return max(0, min(self.max_concurrent - stat.running, bound))

    def on_submitted(self, n: int = 1) -> None:
        """Count ``n`` new groups as running."""
        self._move(n, submitted=1, running=1)

    def on_accepted(self, n: int = 1) -> None:
        """Count ``n`` running groups as pending: they finished."""
        self._move(n, running=-1, pending=1)

    def on_rejected(self, n: int = 1) -> None:
        """Count ``n`` running groups as rejected: they have nothing to train on."""
        self._move(n, running=-1, rejected=1)

    def on_failed(self, n: int = 1) -> None:
        """Count ``n`` running groups as failed."""
        self._move(n, running=-1, failed=1)

    def on_dropped(self, n: int = 1) -> None:
        """Count ``n`` pending groups as dropped: they went stale."""
        self._move(n, pending=-1, dropped=1)

    def on_overdue(self, n: int = 1) -> None:
        """Count ``n`` running groups as accepted and dropped: they went stale."""
        self._move(n, running=-1, dropped=1)

    def on_consumed(self, n: int = 1) -> None:
        """Count ``n`` pending groups as consumed: the trainer has them."""
        self._move(n, pending=-1, consumed=1)

    def on_version_recovered(self, version: int) -> None:
        """Re-base the ledger on a start at ``version``, so that lag is bounded as before.

        ``consumed`` becomes ``version * batch_size``; what is running or pending stays; the other
        totals belong to the run before and begin again.
        """
        if version < 0:
            raise RolloutError(f"cannot recover version {version}: versions begin at 0.")
        with self._lock:
            running, pending = self._stat.running, self._stat.pending
            consumed = version * self.batch_size
            self._stat = RolloutStat(
                submitted=running + pending + consumed,
                running=running,
                pending=pending,
                consumed=consumed,
            )

    def _move(self, n: int, **signs: int) -> None:
        if n < 0:
            raise RolloutError(f"cannot count {n} groups.")
        with self._lock:
            counts: dict[str, int] = vars(self._stat)
            changes = {name: counts[name] + sign * n for name, sign in signs.items()}
            for name, count in changes.items():
                if count < 0:
                    raise RolloutError(
                        f"the ledger would hold {count} {name} groups: {self._stat}. "
                        "Was a group counted twice, or never submitted?"
                    )
            self._stat = replace(self._stat, **changes)
