"""The workflow executor: rollouts in a thread of their own, batches for the trainer's.

Nothing polls: every event that may free capacity submits the next rows. The registry holds the
groups; this file connects it to prompts, workflow, engine and threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.protocol import InferenceEngine, NamedWeights, PublishReport
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError, RolloutTimeout
from sdp_lightning.rollout.auto_concurrency import AutoConcurrency
from sdp_lightning.rollout.checkpoint.saved_group import with_weights
from sdp_lightning.rollout.evaluation import Evaluator
from sdp_lightning.rollout.group_source import GroupSource
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry
from sdp_lightning.rollout.proximal_recompute import (
    LogprobScorer,
    ProximalRecomputer,
    RecomputeReport,
)
from sdp_lightning.rollout.publisher import Publisher
from sdp_lightning.rollout.task_runner import STOP_CHECK_S, AsyncTaskRunner, TaskResult
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.group_play import INFRASTRUCTURE
from sdp_lightning.workflows.own_row import own_copy
from sdp_lightning.workflows.send_gate import SendGate, is_being_cancelled
from sdp_lightning.workflows.workflow import RolloutWorkflow, why_rejected

logger = logging.getLogger(__name__)


class WorkflowExecutor:
    """Keeps rollouts going while the trainer trains, and hands out batches of bounded staleness.

    Use :func:`~sdp_lightning.rollout.factory.create_workflow_executor` to make one.

    Life: ``publish(weights, version, reset=True)`` sets the clock; ``resume`` starts generation;
    then ``take``, train, ``publish(weights, version + 1)``, and so on; ``close`` at the end, also
    after an exception. No token is sampled before the first publish. ``runner`` runs the rollouts.
    """

    def __init__(
        self,
        *,
        config: RolloutConfig,
        engine: InferenceEngine,
        workflow: RolloutWorkflow,
        source: GroupSource,
        gate: SendGate,
        registry: GroupRegistry,
        recomputer: ProximalRecomputer | None,
        ranks: RankGroup,
    ) -> None:
        self.config, self.engine, self.workflow = config, engine, workflow
        self.registry, self.manager, self.gate = registry, registry.manager, gate
        self.concurrency = AutoConcurrency(registry, config)
        self.evaluator = Evaluator(source, registry.clock, timeout_s=config.timeout_s)
        self._source, self._recomputer = source, recomputer
        self.publisher = Publisher(
            *(engine, gate, ranks, registry),
            config=config,
            commit=self._commit,
            on_served=self._submit_rows,
        )
        self.runner = AsyncTaskRunner(name="sdp-rollout", on_result=self._on_task_result)
        self._generating = self._closed = False
        source.watch(self._submit_rows)

    @property
    def version(self) -> int:
        """The policy version that the trainer holds. ``VersionError`` before the first publish."""
        return self.registry.clock.version

    @property
    def is_published(self) -> bool:
        """Whether the first publish has happened."""
        return self.registry.clock.is_set

    @property
    def is_finished(self) -> bool:
        """Whether the prompts have ended and no group is left to be taken."""
        with self.registry.changed:
            return self._is_exhausted() and self.stat.pending == 0

    @property
    def stat(self) -> RolloutStat:
        """The counters of the ledger, all of the same instant."""
        return self.manager.stat

    @property
    def telemetry(self) -> RolloutTelemetry:
        """Why groups were lost, their lengths and durations."""
        return self.registry.telemetry

    # Versions ------------------------------------------------------------------------------------

    def publish(self, weights: NamedWeights, version: int, *, reset: bool = False) -> PublishReport:
        """Give the engine ``weights`` as ``version``, commit it, and drop stale groups.

        With ``reset`` (a start, fresh or resumed) any version goes, and the ledger is re-based.
        When this returns, every token sampled before is in its Episode. If it raises, no token is
        sampled by weights of an unknown version. With ``overlap_publish`` it returns once the
        weights are staged, with the report of the publish before
        (:class:`~sdp_lightning.rollout.publisher.Publisher`).

        Raises:
            VersionError: if ``version`` is not the next one, or the engine reports another.
            EngineError: if the transfer failed.
            RolloutTimeout: if outstanding requests did not come back.
        """
        report = self.publisher.publish(weights, version, reset=reset)
        self._submit_rows()
        return report

    def _commit(self, version: int, *, reset: bool, served: bool) -> None:
        if reset:
            overdue = self.registry.resume(version)
        else:
            overdue = self.registry.commit(version, served=served)
        for group in overdue:
            if group.task_id is not None:
                self.runner.cancel(group.task_id)
        with self.registry.changed:
            self._source.remove(self.registry.drop_if_overdue)

    # Batches -------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Keep submitting rows from now on. ``VersionError`` before the first publish."""
        logger.debug("rollouts start at version %d", self.version)
        self._generating = True
        self._submit_rows()

    def pause(self) -> None:
        """Submit no more rows; running groups go on."""
        with self.registry.changed:
            self._generating = False

    def take(
        self,
        timeout_s: float | None = None,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        fill: bool = False,
    ) -> list[TrajectoryGroup] | None:
        """The oldest ``batch_size`` groups, or None when the prompts have ended.

        The last groups may be fewer, by ``last_batch`` of the config.

        Args:
            timeout_s: longest wait; None is the configured one, 0 does not wait.
            interrupted: looked at while waiting; True ends the wait.
            fill: go on with one more epoch when the prompts have ended, for a whole batch.

        Raises:
            RolloutTimeout: at the deadline, or interrupted. Nothing is lost.
            RolloutError: if a rollout failed, or the rollout thread died.
            VersionError: before the first publish.
        """
        version = self.version
        limit = self.config.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        with self.registry.changed:
            while True:
                self._raise_failure()
                batch = self.registry.take()
                if not batch and self._is_exhausted():
                    rest = self.stat.pending
                    if not self._is_filled(rest) and not fill:
                        fewer = self.config.last_batch == "short"
                        return self.registry.take(fewer=fewer) or None
                    self._source.extend(self.config.batch_size - rest)
                    self._submit_rows()
                elif batch:
                    return batch
                left = deadline - time.monotonic()
                stopped = interrupted()
                if left <= 0 or stopped:
                    why = "interrupted while waiting" if stopped else f"waited {limit:.1f} s"
                    raise RolloutTimeout(
                        f"{why} for {self.config.batch_size} groups: {self._describe(version)}"
                    )
                self.registry.changed.wait(min(left, STOP_CHECK_S))

    def evaluate(
        self,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        *,
        timeout_s: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[TrajectoryGroup]:
        """Roll ``rows`` out on the published version: no ledger, no capacity, no training.

        Rejected rows are left out. The errors are those of
        :meth:`Evaluator.roll_out <sdp_lightning.rollout.evaluation.Evaluator.roll_out>`.
        """
        self.publisher.finish()
        return self.evaluator.evaluate(rows, workflow, timeout_s=timeout_s, interrupted=interrupted)

    def close(self) -> None:
        """Cancel all rollouts and end their thread. Safe to call twice."""
        with self.registry.changed:
            self._closed, self._generating = True, False
            self.registry.changed.notify_all()
        self._source.close()
        self.runner.close()
        self.publisher.close()

    @property
    def scores_segments(self) -> bool:
        """Whether segments are scored at all: the mode is on, and tokens may be old enough."""
        return self._recomputer is not None and self.config.max_head_lag > 1

    def recompute(self, scorer: LogprobScorer) -> RecomputeReport:
        """Score segments of groups in flight under the present version, which ``scorer`` holds.

        Call it after ``take`` and before the optimizer moves the weights. It does nothing when the
        segment-wise mode is off. Generation goes on meanwhile.
        """
        if self._recomputer is None or not self.scores_segments:
            return RecomputeReport()
        self.publisher.finish()
        return self._recomputer.run(self.registry, scorer, self.version)

    # Checkpoints ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompts and all groups of one instant; rollouts go on while it is made.

        A group that runs at that instant may have sampled more by then.
        """
        self.publisher.wait()
        with self.registry.changed:
            position = self._source.position(self.registry.snapshot())
        return position.state_dict() | self.concurrency.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``: finished groups are pending again, the others are resubmitted.

        Resubmitted groups keep their order, versions and sampled tokens, and come before any new
        row, as far as there is capacity. Named rewards of finished groups get the weights that the
        workflow has now. If it has other names, the rows of these groups begin anew.

        Raises:
            ConfigError: if something was published already, or the prompts differ.
            RolloutError: if the row of an interrupted group cannot be read.
        """
        if self.is_published:
            raise ConfigError("load_state_dict() must come before the first publish.")
        restored = self._source.load_state_dict(state)
        self.concurrency.load_state_dict(state)
        kept, others = with_weights(restored, self.workflow.reward_weights)
        for group in others:
            self._source.give_back(group)
        self.registry.restore(kept)

    # Submitting and finishing, in whichever thread -----------------------------------------------

    def _submit_rows(self) -> None:
        with self.registry.changed:
            while self._generating and not self._closed and self.registry.failure is None:
                served = self.registry.clock.served
                if self.manager.capacity(served) <= 0:
                    return
                try:
                    group = self._source.next(served)
                except RolloutError as error:  # raised again in take()
                    self.registry.fail(error)
                    return
                if group is None:
                    self.registry.changed.notify_all()
                    return
                try:
                    group.task_id = self.runner.submit(self._roll_out, group)
                except RolloutError:
                    self._source.put_back(group)
                    raise
                self.registry.add(group)

    async def _roll_out(self, group: InFlightGroup) -> None:
        session = group.session
        try:
            row = await own_copy(group.row.data)
            trajectories = await self.workflow.run(row, session)
            session.end()
            if session.divergence:
                pass
            elif reason := session.rejection or why_rejected(trajectories):
                self.registry.reject(group, reason)
            else:
                self.registry.finish(group, group.make_group(trajectories or ()))
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise
            if not session.divergence:  # it came from inside the workflow
                self.registry.record_failure(group, error)
        except InfrastructureError as error:  # of the whole group
            session.add_error(error.cause)
            if not session.divergence:
                self.registry.reject(group, INFRASTRUCTURE)
        except Exception as error:  # handed to the trainer, which raises it in take()
            if not session.divergence:
                self.registry.record_failure(group, error)
        if session.divergence:
            self.registry.restart(group, self._source.new_session(group.row))
            await self._roll_out(group)
        else:
            self._submit_rows()

    def _on_task_result(self, result: TaskResult) -> None:
        if result.error is not None:
            self.registry.fail(result.error)

    def _is_filled(self, rest: int) -> bool:
        """Whether a last batch that has ``rest`` groups is filled from one more epoch."""
        return self.config.last_batch == "fill" and rest > 0

    def _is_exhausted(self) -> bool:
        return self._generating and self._source.is_exhausted and self.stat.running == 0

    def _raise_failure(self) -> None:
        if self.registry.failure is not None:
            raise self.registry.failure
        if self._closed:
            raise RolloutError("the executor is closed.")
        self.runner.raise_if_dead()

    def _describe(self, version: int) -> str:
        stat, awaited_s = self.stat, self._source.awaited_s
        awaited = "" if awaited_s is None else f"; the prompts gave no row for {awaited_s:.1f} s"
        return (
            f"{stat.pending} are ready, {stat.running} run, {stat.dropped} were dropped, "
            f"{stat.rejected} rejected and {stat.failed} failed so far; capacity is "
            f"{self.manager.capacity(version)} at version {version}; the engine has "
            f"sampled {self.engine.num_generated} tokens{awaited}."
        )
