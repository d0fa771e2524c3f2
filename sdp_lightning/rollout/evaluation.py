"""Evaluation: rollouts that are judged and never trained on, outside of ledger and capacity."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence

from sdp_lightning.errors import InfrastructureError, RolloutError, error_text
from sdp_lightning.prompts.stream import EVALUATION_EPOCH, PromptRow
from sdp_lightning.rollout.group_source import GroupSource
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.version_clock import VersionClock
from sdp_lightning.rollout.task_runner import AsyncTaskRunner
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.own_row import own_copy
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow, why_rejected

logger = logging.getLogger(__name__)


class Evaluator:
    """Rolls rows out on the published version, in an event loop of their own.

    Args:
        source: makes the sessions of the groups.
        clock: says the version.
        timeout_s: longest wait in seconds for all groups of a call.
    """

    def __init__(self, source: GroupSource, clock: VersionClock, *, timeout_s: float) -> None:
        self._source, self._clock, self._timeout_s = source, clock, timeout_s

    def evaluate(
        self,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        *,
        timeout_s: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[TrajectoryGroup]:
        """Roll out ``rows``, each as a prompt of the evaluation; see :meth:`roll_out`."""
        prompts = [PromptRow(EVALUATION_EPOCH, index, row) for index, row in enumerate(rows)]
        return self.roll_out(prompts, workflow, timeout_s=timeout_s, interrupted=interrupted)

    def roll_out(
        self,
        prompts: Sequence[PromptRow],
        workflow: RolloutWorkflow,
        *,
        first_order: int = 0,
        timeout_s: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[TrajectoryGroup]:
        """The groups of ``prompts``, in their order; rejected rows are left out.

        Args:
            prompts: epoch and index of each are part of the seed of its tokens.
            workflow: what one rollout does.
            first_order: ``order`` of the first group.
            timeout_s: longest wait in seconds; None is the configured one.
            interrupted: looked at while waiting; True ends the wait.

        Raises:
            RolloutTimeout: at the deadline, or interrupted.
            RolloutError: if a rollout failed, naming the row.
            VersionError: before the first publish.
        """
        parts = self.roll_out_in_parts(
            *(prompts, workflow, [len(prompts)]),
            first_order=first_order,
            timeout_s=timeout_s,
            interrupted=interrupted,
        )
        return sorted(next(parts), key=lambda group: group.order)

    def roll_out_in_parts(
        self,
        prompts: Sequence[PromptRow],
        workflow: RolloutWorkflow,
        sizes: Sequence[int],
        *,
        first_order: int = 0,
        timeout_s: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Generator[list[TrajectoryGroup]]:
        """Roll all prompts out at once, and give their groups in parts of ``sizes`` as they finish.

        Arguments and errors are those of :meth:`roll_out`.
        """
        version, sessions = self._clock.version, list[RolloutSession]()
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        runner = AsyncTaskRunner(name="sdp-evaluation", interrupted=interrupted)
        try:
            for order, prompt in enumerate(prompts, first_order):
                session = self._source.new_session(prompt)
                sessions.append(session)
                runner.submit(_roll_out, InFlightGroup(order, prompt, version, session), workflow)
            for number, size in enumerate(sizes, 1):
                found: list[TrajectoryGroup | None] = runner.wait(
                    size, max(0.0, deadline - time.monotonic())
                )
                if number == len(sizes):  # the consumer may not ask again
                    runner.close()
                    _warn_of_errors(sessions)
                yield [group for group in found if group is not None]
        finally:
            runner.close()


def _warn_of_errors(sessions: Sequence[RolloutSession]) -> None:
    causes = Counter(cause for session in sessions for cause in session.take_errors())
    if causes:
        logger.warning(
            "evaluation: %d samples of %d rows are left out, as infrastructure failed: %s",
            *(sum(session.num_left_out for session in sessions), len(sessions)),
            ", ".join(f"{count} x {cause}" for cause, count in causes.items()),
        )


async def _roll_out(group: InFlightGroup, workflow: RolloutWorkflow) -> TrajectoryGroup | None:
    row = group.row
    try:
        trajectories = await workflow.run(await own_copy(row.data), group.session)
    except InfrastructureError as error:
        group.session.add_error(error.cause)
        return None
    except Exception as error:
        raise RolloutError(f"evaluating row {row.row_id!r} failed: {error_text(error)}") from error
    return None if why_rejected(trajectories) else group.make_group(trajectories or ())
