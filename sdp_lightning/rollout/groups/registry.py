"""The live groups of one executor: one lock, one clock, every transition of the ledger.

A group is live from its submission until the version that trained on it is committed, or it was
dropped, rejected or failed. No threads of its own, no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import RolloutError, VersionError, describe
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import StalenessManager
from sdp_lightning.rollout.groups.queue import RolloutCache, RolloutQueue
from sdp_lightning.rollout.groups.staleness import StalenessControlStrategy
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry
from sdp_lightning.types import TrajectoryGroup
from sdp_lightning.workflows.workflow import RolloutSession

logger = logging.getLogger(__name__)


class GroupRegistry:
    """Every live group, where it stands, and the policy version that judges it.

    ``changed`` is the one lock, and is notified at every transition. Methods take it themselves.
    ``on_drop`` is called under it, for each group that is dropped.

    Attributes:
        failure: the first error that the trainer must see, None so far.
    """

    def __init__(
        self,
        config: RolloutConfig,
        strategy: StalenessControlStrategy,
        manager: StalenessManager,
        *,
        on_drop: Callable[[InFlightGroup], None],
    ) -> None:
        self.changed = threading.Condition()
        self.telemetry = RolloutTelemetry()
        self.failure: Exception | None = None
        self._config, self._strategy, self._manager = config, strategy, manager
        self._on_drop = on_drop
        self._live: dict[int, InFlightGroup] = {}
        self._held: list[InFlightGroup] = []
        self._queue = RolloutQueue((config.max_head_lag + 1) * config.batch_size)
        self._cache = RolloutCache()
        self._restored: list[TrajectoryGroup] = []
        self._version: int | None = None
        self._rejected_in_a_row = 0

    @property
    def version(self) -> int | None:
        """The policy version, None before the first publish."""
        return self._version

    def snapshot(self) -> list[InFlightGroup]:
        """Every live group, in the order of submission."""
        with self.changed:
            return list(self._live.values())

    def fail(self, error: Exception) -> None:
        """Keep the first error, for the trainer to raise."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    # One group -----------------------------------------------------------------------------------

    def add(self, live: InFlightGroup) -> None:
        """A group was submitted."""
        with self.changed:
            self._manager.on_submitted()
            self._live[live.order] = live
            self.changed.notify_all()

    def restart(self, live: InFlightGroup, session: RolloutSession) -> None:
        """The workflow did not repeat what was saved: it begins anew in ``session``."""
        with self.changed:
            if not self.telemetry.num_diverged:
                logger.warning(
                    "the workflow did not repeat what the checkpoint holds of row %r: %s. What was "
                    "saved of it is discarded, and it is sampled from scratch. Has the workflow "
                    "changed, or does it act by chance? Further rows are counted only.",
                    live.row.row_id,
                    live.session.divergence,
                )
            self.telemetry.num_diverged += 1
            live.session = session
            live.created_version = live.created_version if self._version is None else self._version

    def finish(self, live: InFlightGroup, group: TrajectoryGroup) -> None:
        """A workflow returned ``group``: it waits to be trained, unless it is stale already."""
        with self.changed:
            if live.order in self._live:  # else it was dropped as overdue while it finished
                live.group = group
                live.seconds = time.monotonic() - live.started_at
                self.telemetry.on_finished(live.seconds, live.times)
                self._admit(live)
            self.changed.notify_all()

    def reject(self, live: InFlightGroup, reason: str) -> None:
        """A workflow returned nothing to train on."""
        with self.changed:
            if self._live.pop(live.order, None) is None:
                return
            self._manager.on_rejected()
            self.telemetry.rejections[reason] = self.telemetry.rejections.get(reason, 0) + 1
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row >= self._config.max_rejected_in_a_row:
                self.fail(
                    RolloutError(
                        f"{self._rejected_in_a_row} groups in a row were rejected, the last one "
                        f"(row {live.row.row_id!r}) because {reason}."
                    )
                )
            self.changed.notify_all()

    def record_failure(self, live: InFlightGroup, error: BaseException) -> None:
        """A workflow raised: count it, and beyond ``max_failures`` let the trainer see it."""
        with self.changed:
            if self._live.pop(live.order, None) is None:
                return  # dropped as overdue before
            self._manager.on_failed()
            failure = RolloutError(
                f"the rollout of row {live.row.row_id!r}, submitted at version "
                f"{live.created_version}, failed: {describe(error)}"
            )
            failure.__cause__ = error
            if self._manager.stat.failed > self._config.max_failures:
                self.fail(failure)
            else:
                limit = self._config.max_failures
                logger.warning("%s (within max_failures=%d)", failure, limit)
            self.changed.notify_all()

    # The trainer's batches and versions ----------------------------------------------------------

    def restore(self, groups: Sequence[tuple[InFlightGroup, TrajectoryGroup]]) -> None:
        """Finished groups of a checkpoint; they wait to be trained from the first publish on."""
        with self.changed:
            for live, group in groups:
                live.group, live.seconds = group, 0.0
                self._live[live.order] = live
                self._restored.append(group)

    def drop_if_overdue(self, live: InFlightGroup) -> bool:
        """Whether a group that still waits to be resubmitted is stale: then it is counted out."""
        with self.changed:
            if self._version is None or not self._is_overdue(live, self._version):
                return False
            self.add(live)
            self._drop_running(live)
            return True

    def resume(self, version: int) -> None:
        """A start at ``version``: set the clock, re-base the ledger, take restored groups in."""
        with self.changed:
            self._version = version
            self._manager.on_version_recovered(version)
            restored, self._restored = self._restored, []
            self._manager.on_submitted(len(restored))
            self._manager.on_accepted(len(restored))
            self._cache.add(restored)
            self._purge(version)
            self.changed.notify_all()

    def commit(self, version: int) -> list[InFlightGroup]:
        """Advance the clock by one, purge what went stale; returns overdue groups to cancel.

        Raises:
            VersionError: if ``version`` is not the next one.
        """
        with self.changed:
            if self._version is None or version != self._version + 1:
                raise VersionError(
                    f"the policy is at version {self._version}; cannot commit {version}. "
                    "Versions advance by 1."
                )
            self._version = version
            for order in [live.order for live in self._live.values() if live.in_training]:
                del self._live[order]
            self._purge(version)
            overdue = [live for live in self._running() if self._is_overdue(live, version)]
            for live in overdue:
                self._drop_running(live)
            self.changed.notify_all()
            return overdue

    def take(self) -> list[TrajectoryGroup]:
        """The oldest ``batch_size`` groups, or none if they are not ready."""
        with self.changed:
            self._cache.add(self._queue.drain())
            while self._held:
                self._admit_held()
                self._cache.add(self._queue.drain())
            if self._config.on_overdue == "wait" and self._must_wait():
                return []
            batch = self._cache.take(self._config.batch_size)
            self._manager.on_consumed(len(batch))
            for group in batch:
                live = self._live[group.order]
                live.in_training = True
                self.telemetry.on_ended(live.record("trained"))
            return batch

    # Helpers, under the lock ---------------------------------------------------------------------

    def _running(self) -> list[InFlightGroup]:
        return [live for live in self._live.values() if live.group is None]

    def _is_overdue(self, live: InFlightGroup, version: int) -> bool:
        versions = live.versions
        return versions is not None and self._strategy.is_overdue(*versions, version)

    def _must_wait(self) -> bool:
        """Whether the oldest batch now would leave more old groups than later ones can take.

        Each later batch takes ``batch_size`` groups, so after j of them at most ``j * batch_size``
        of those left may be stale. A group counts from its creation: that is the order of batches.
        """
        size, version = self._config.batch_size, self._version
        batch = self._cache.snapshot()[:size]
        if version is None or len(batch) < size:
            return False
        if not any(live.order < batch[-1].order for live in self._running()):
            return False  # waiting would change nothing
        taken = {group.order for group in batch}
        left = [
            live.created_version
            for live in self._live.values()
            if not live.in_training and live.order not in taken
        ]
        return any(
            sum(self._strategy.is_overdue(created, created, version + 1 + j) for created in left)
            > j * size
            for j in range(self._config.max_head_lag + 1)
        )

    def _purge(self, version: int) -> None:
        def is_stale(group: TrajectoryGroup) -> bool:
            return self._strategy.is_stale(group, version)

        for group in [*self._queue.purge(is_stale), *self._cache.purge(is_stale)]:
            self._manager.on_dropped()
            self._record_drop(self._live.pop(group.order), "stale")
        self._admit_held()

    def _drop_running(self, live: InFlightGroup) -> None:
        self._manager.on_overdue()
        self._record_drop(self._live.pop(live.order), "overdue")

    def _record_drop(self, live: InFlightGroup, fate: Literal["stale", "overdue"]) -> None:
        self.telemetry.on_ended(live.record(fate))
        self._on_drop(live)

    def _admit_held(self) -> None:
        held, self._held = self._held, []
        for live in held:
            self._admit(live)

    def _admit(self, live: InFlightGroup) -> None:
        assert live.group is not None and self._version is not None
        if self._strategy.is_stale(live.group, self._version):
            self._drop_running(live)
        elif self._queue.put(live.group):
            self._manager.on_accepted()
            self._rejected_in_a_row = 0
        else:  # back-pressure: it stays running in the ledger until there is space
            self._held.append(live)
