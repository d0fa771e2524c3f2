"""The groups in flight of one executor: one lock, one clock, every transition of the ledger.

A group is in flight from its submission until the version that trained on it is committed, or it
was dropped, rejected or failed. No threads, no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import RolloutError, error_text
from sdp_lightning.rollout.groups.group_index import LookTimes, Untrained
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import StalenessManager
from sdp_lightning.rollout.groups.queue import RolloutCache, RolloutQueue
from sdp_lightning.rollout.groups.staleness import StalenessControlStrategy
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry, count_name
from sdp_lightning.rollout.groups.version_clock import VersionClock
from sdp_lightning.types import TrajectoryGroup
from sdp_lightning.workflows.workflow import RolloutSession

logger = logging.getLogger(__name__)


class GroupRegistry:
    """Every group in flight, its state, and the clock that decides which ones are stale.

    Args:
        config: bounds and limits, in groups of this process.
        strategy: decides which groups are stale.
        manager: the ledger.
        on_drop: called with each group that is dropped, under the lock.

    Attributes:
        changed: the one lock, notified at every transition. Methods take it themselves.
        clock: the policy version.
        telemetry: why groups were lost, and how long they were.
        failure: the first error that the trainer must see, None so far.
    """

    def __init__(
        self,
        config: RolloutConfig,
        strategy: StalenessControlStrategy,
        manager: StalenessManager,
        *,
        on_drop: Callable[[InFlightGroup], None] | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.telemetry = RolloutTelemetry()
        self.failure: Exception | None = None
        self.clock = VersionClock()
        self.manager = manager
        self._config, self._strategy = config, strategy
        self._on_drop = on_drop
        self._in_flight: dict[int, InFlightGroup] = {}
        self._in_hand: list[InFlightGroup] = []
        self._held: OrderedDict[int, TrajectoryGroup] = OrderedDict()
        self._looks, self._untrained = LookTimes(), Untrained()
        self._queue = RolloutQueue((config.max_head_lag + 1) * config.batch_size)
        self._cache = RolloutCache()
        self._restored: list[TrajectoryGroup] = []
        self._rejected_in_a_row = 0

    def snapshot(self) -> list[InFlightGroup]:
        """Every group in flight, in the order of submission."""
        with self.changed:
            return list(self._in_flight.values())

    def in_hand(self) -> list[InFlightGroup]:
        """The groups that the trainer has and has not committed, in the order of their batch."""
        with self.changed:
            return sorted(self._in_hand, key=lambda group: group.order)

    def fail(self, error: Exception) -> None:
        """Keep the first error, for the trainer to raise."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    # One group -----------------------------------------------------------------------------------

    def add(self, group: InFlightGroup) -> None:
        """Count a group as submitted and running."""
        with self.changed:
            self.manager.on_submitted()
            self._in_flight[group.order] = group
            self._index_running(group)
            self.changed.notify_all()

    def restart(self, group: InFlightGroup, session: RolloutSession) -> None:
        """Begin a group anew in ``session``: its workflow did not repeat its saved steps."""
        with self.changed:
            if not self.telemetry.num_diverged:
                logger.warning(
                    "the workflow did not repeat its steps in the checkpoint for row %r: %s. The "
                    "saved tokens are discarded and the row is sampled from scratch. Has the "
                    "workflow changed, or is it random? Further rows are only counted.",
                    group.row.row_id,
                    group.session.divergence,
                )
            self.telemetry.num_diverged += 1
            self.telemetry.on_errors(group.row.row_id, group.session)
            group.session = session
            if self.clock.is_set:
                group.created_version = self.clock.served
                if group.order in self._in_flight:
                    self._index_running(group)

    def finish(self, group: InFlightGroup, finished: TrajectoryGroup) -> None:
        """Queue what a workflow returned, or drop it if it is stale already."""
        with self.changed:
            if group.order in self._in_flight:  # else it was dropped as overdue while it finished
                group.finished = finished
                group.seconds = time.monotonic() - group.started_at
                self.telemetry.on_finished(group.seconds, group.times)
                self.telemetry.on_errors(group.row.row_id, group.session)
                self._admit(group)
            self.changed.notify_all()

    def reject(self, group: InFlightGroup, reason: str) -> None:
        """Count a group out whose workflow returned nothing to train on."""
        with self.changed:
            if not self._remove(group):
                return
            self.manager.on_rejected()
            self.telemetry.on_errors(group.row.row_id, group.session)
            count_name(self.telemetry.rejections, reason)
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row >= self._config.max_rejected_in_a_row:
                self.fail(
                    RolloutError(
                        f"{self._rejected_in_a_row} groups in a row were rejected, the last one "
                        f"(row {group.row.row_id!r}) because {reason}."
                        f"{self.telemetry.errors_text}"
                    )
                )
            self.changed.notify_all()

    def record_failure(self, group: InFlightGroup, error: BaseException) -> None:
        """Count a group as failed; beyond ``max_failures`` the trainer raises ``error``."""
        with self.changed:
            if not self._remove(group):
                return  # dropped as overdue before
            self.manager.on_failed()
            self.telemetry.on_errors(group.row.row_id, group.session)
            failure = RolloutError(
                f"the rollout of row {group.row.row_id!r}, submitted at version "
                f"{group.created_version}, failed: {error_text(error)}"
            )
            failure.__cause__ = error
            if self.manager.stat.failed > self._config.max_failures:
                self.fail(failure)
            else:
                limit = self._config.max_failures
                logger.warning("%s (within max_failures=%d)", failure, limit)
            self.changed.notify_all()

    # The trainer's batches and versions ----------------------------------------------------------

    def restore(self, groups: Sequence[tuple[InFlightGroup, TrajectoryGroup]]) -> None:
        """Take in finished groups of a checkpoint; the first publish queues them."""
        with self.changed:
            for group, finished in groups:
                group.finished, group.seconds = finished, 0.0
                self._in_flight[group.order] = group
                self._untrained.add(group.order, group.created_version, runs=False)
                self._restored.append(finished)

    def drop_if_overdue(self, group: InFlightGroup) -> bool:
        """Drop a group that waits to be resubmitted if it is stale. Returns whether it was."""
        with self.changed:
            if not self.clock.is_set or not self._is_overdue(group, self.clock.version):
                return False
            self.add(group)
            self._drop_running(group)
            return True

    def resume(self, version: int) -> list[InFlightGroup]:
        """Start at any ``version``, and queue restored groups; returns overdue groups to cancel."""
        with self.changed:
            self.clock.set(version)
            self.manager.on_version_recovered(version)
            restored, self._restored = self._restored, []
            self.manager.on_submitted(len(restored))
            self.manager.on_accepted(len(restored))
            self._cache.add(restored)
            for order, group in self._in_flight.items():
                self._looks.set(order, None if group.in_training else version)
            return self._purge(version)

    def commit(self, version: int, *, served: bool = True) -> list[InFlightGroup]:
        """Advance the clock by one and purge stale groups; returns overdue groups to cancel.

        Without ``served`` engines sample the version before until :meth:`serve`. What they sample
        meanwhile has a lag of 1, so with ``max_head_lag >= 1`` nothing goes stale by it.

        Raises:
            VersionError: if ``version`` is not the next one, or the present one is not served yet.
        """
        with self.changed:
            self.clock.advance(version, served=served)
            for group in self._in_hand:
                del self._in_flight[group.order]
            self._in_hand.clear()
            return self._purge(version)

    def serve(self) -> None:
        """Note that engines sample the version that was committed."""
        with self.changed:
            self.clock.serve()
            self.changed.notify_all()

    def take(self, *, fewer: bool = False) -> list[TrajectoryGroup]:
        """The oldest ``batch_size`` groups, or none if they are not ready, or all if ``fewer``."""
        with self.changed:
            self._cache.add(self._queue.drain())
            while self._held:
                self._admit_held()
                self._cache.add(self._queue.drain())
            if self._config.on_overdue == "wait" and self._must_wait():
                return []
            batch = self._cache.take(self._config.batch_size, fewer=fewer)
            self.manager.on_consumed(len(batch))
            for finished in batch:
                group = self._in_flight[finished.order]
                group.in_training = True
                self._in_hand.append(group)
                self._looks.discard(group.order)
                self._untrained.discard(group.order)
                self.telemetry.on_ended(group.record("trained"))
            return batch

    # Helpers, under the lock ---------------------------------------------------------------------

    def _index_running(self, group: InFlightGroup) -> None:
        created = group.created_version  # no token of it is older
        self._untrained.add(group.order, created, runs=True)
        self._looks.set(group.order, self._strategy.overdue_from(created, created))

    def _remove(self, group: InFlightGroup) -> bool:
        """Whether the group was in flight, which it is no more."""
        self._looks.discard(group.order)
        self._untrained.discard(group.order)
        return self._in_flight.pop(group.order, None) is not None

    def _is_overdue(self, group: InFlightGroup, version: int) -> bool:
        created = group.created_version
        if not self._strategy.is_overdue(created, created, version):
            return False  # no token of it is older
        versions = group.versions
        return versions is not None and self._strategy.is_overdue(*versions, version)

    def _must_wait(self) -> bool:
        """Whether the oldest batch now would leave more old groups than later ones can take.

        A group counts from its creation: that is the order of batches.
        """
        size = self._config.batch_size
        batch, oldest = self._cache.first(size), self._untrained.oldest_running
        if len(batch) < size or oldest is None or oldest > batch[-1].order:
            return False  # waiting would change nothing
        return self._untrained.exceed(
            size,
            (group.order for group in batch),
            self.clock.version + 1,
            lambda created: self._strategy.overdue_from(created, created),
        )

    def _purge(self, version: int) -> list[InFlightGroup]:
        """Drop the stale groups, and queue held ones; returns those that still ran."""
        overdue: list[InFlightGroup] = []
        stale: dict[int, InFlightGroup] = {}
        later: dict[int, int | None] = {}
        for group in [self._in_flight[order] for order in self._looks.due(version)]:
            if group.finished is None:
                if self._is_overdue(group, version):
                    overdue.append(group)
                else:
                    later[group.order] = version + 1
            elif self._strategy.is_stale(group.finished, version):
                stale[group.order] = group
            else:
                later[group.order] = self._strategy.stale_from(group.finished, version)
        for order, first in later.items():
            self._looks.set(order, first)
        self._drop_finished(stale)
        self._admit_held()
        for group in overdue:
            self._drop_running(group)
        self.changed.notify_all()
        return overdue

    def _drop_finished(self, stale: dict[int, InFlightGroup]) -> None:
        for queued in [*self._queue.remove(stale.keys()), *self._cache.remove(stale.keys())]:
            group = stale.pop(queued.order)
            self.manager.on_dropped()
            self._remove(group)
            self._record_drop(group, "stale")
        for group in stale.values():  # held back: the ledger has it running
            del self._held[group.order]
            self._drop_running(group)

    def _drop_running(self, group: InFlightGroup) -> None:
        self.telemetry.on_errors(group.row.row_id, group.session)
        self.manager.on_overdue()
        if group.finished is None and (aside_s := group.aside_s) is not None:
            self.telemetry.on_aside(group.row.row_id, aside_s)
        self._remove(group)
        self._record_drop(group, "overdue")

    def _record_drop(self, group: InFlightGroup, fate: Literal["stale", "overdue"]) -> None:
        self.telemetry.on_ended(group.record(fate))
        if self._on_drop is not None:
            self._on_drop(group)

    def _admit_held(self) -> None:
        while self._held:
            order, finished = next(iter(self._held.items()))
            if not self._queue.put(finished):
                return
            del self._held[order]
            self._on_queued()

    def _admit(self, group: InFlightGroup) -> None:
        finished, version = group.finished, self.clock.version
        assert finished is not None
        if self._strategy.is_stale(finished, version):
            self._drop_running(group)
            return
        self._untrained.on_finished(group.order)
        self._looks.set(group.order, self._strategy.stale_from(finished, version))
        if self._queue.put(finished):
            self._on_queued()
        else:  # back-pressure: it stays running in the ledger until there is space
            self._held[group.order] = finished

    def _on_queued(self) -> None:
        self.manager.on_accepted()
        self._rejected_in_a_row = 0
