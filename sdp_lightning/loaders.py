"""What the Trainer iterates over: batches of rollouts, and one evaluation.

Both wait for rollouts in the trainer's thread, and end when the process is told to.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.activity import Activity
from sdp_lightning.config import MissingProximal
from sdp_lightning.distributed.rank_group import Ranks
from sdp_lightning.errors import ConfigError, RankError, RolloutError, RolloutTimeout
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.telemetry import Counts, count
from sdp_lightning.training.batch import Batch, SealedBatch, collate
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.base import RolloutWorkflow


class StopRequest:
    """Whether the run was told to stop. Waits look at it, which is also their sign of life.

    Attributes:
        signum: of the signal that told it; None while there was none.
        agreed: whether all ranks know, each between two steps, and end now.
        looked_at: when a wait last looked, by ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.agreed = False
        self.looked_at = 0.0

    def look(self) -> bool:
        """Whether to stop."""
        self.looked_at = time.monotonic()
        return self.signum is not None

    def obey(self, signums: Iterable[int | None]) -> None:
        """End the run if one rank was told to: ``KeyboardInterrupt`` or ``SIGTERMException``."""
        for signum in signums:
            if signum is not None:
                self.agreed = True
                raise_as_lightning(signum)


def raise_as_lightning(signum: int) -> None:
    """What Lightning raises for Ctrl-C, or for SIGTERM."""
    raise KeyboardInterrupt if signum == signal.SIGINT else SIGTERMException()


class RolloutLoader:
    """Pulls one batch a training step from the executor, as soon as it is ready.

    Args:
        executor: where rollouts are.
        pad_token_id: for the padding of a batch.
        length: how many batches an epoch has.
        trainer: asked for SIGTERM while waiting, and told when prompts or time have ended.
        ranks: that take their batches together: all, or none.
        stop: looked at before a batch is taken and while it is waited for.
        activity: told when a batch is waited for.

    Attributes:
        ended: whether all prompts were handed out.
        counts: over all ranks, when the latest batch was taken: what became of groups so far, and
            the tokens ``generated`` since the batch before.
    """

    def __init__(
        self,
        executor: WorkflowExecutor,
        *,
        pad_token_id: int,
        length: int,
        trainer: L.Trainer,
        ranks: Ranks,
        stop: StopRequest,
        activity: Activity,
    ) -> None:
        self.ended = False
        self.counts: Counts = {}
        self._generated = executor.engine.num_generated
        self._ranks, self._stop, self._activity = ranks, stop, activity
        self._executor, self._pad_token_id = executor, pad_token_id
        self._length, self._trainer = length, trainer

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SealedBatch]:
        require_published(self._executor)
        if self.ended:
            raise RolloutError(
                "the prompts have ended, but the Trainer goes on: leave out its min_steps and "
                "min_epochs, or raise num_epochs of the RolloutConfig."
            )
        while (groups := self._take()) is not None:
            yield SealedBatch(self._collate(groups))
        self._trainer.should_stop = True  # else Lightning begins one empty epoch after another

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module has it all. Lightning asks here whether a resume is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def _take(self) -> list[TrajectoryGroup] | None:
        self._activity.enter("wait")
        with ends_on_sigterm(self._trainer):
            (groups, _), told = self._ranks.together(
                f"taking the batch of version {self._executor.version}",
                self._take_mine,
                self._tell,
            )
        self._stop.obey(signum for _, signum, _ in told)
        self._activity.enter("rest")
        columns = zip(*(values for *_, values in told), strict=True)
        self.counts = dict(zip(self.counts, map(sum, columns), strict=True))
        return None if any(ended for ended, *_ in told) else groups

    def _tell(
        self, taken: tuple[list[TrajectoryGroup] | None, int | None]
    ) -> tuple[bool, int | None, list[float]]:
        """Whether prompts have ended, the signal, and what is added up: no meeting of its own."""
        executor, before = self._executor, self._generated
        self._generated = executor.engine.num_generated
        self.counts = count(executor.stat, executor.telemetry, executor.workflow.counts)
        self.counts["generated"] = self._generated - before
        return taken[0] is None, taken[1], [*self.counts.values()]

    def _take_mine(self) -> tuple[list[TrajectoryGroup] | None, int | None]:
        """A batch, or None if prompts or time have ended; and the signal that told to stop."""
        try:
            if self._stop.look():
                return [], self._stop.signum
            groups = self._executor.take(interrupted=self._is_interrupted)
        except RolloutTimeout:
            if self._stop.signum is not None:
                return [], self._stop.signum
            if _is_time_up(self._trainer):
                return None, None
            raise
        self.ended = groups is None
        return groups, None

    def _is_interrupted(self) -> bool:
        return self._stop.look() or self._trainer.received_sigterm or _is_time_up(self._trainer)

    def _collate(self, groups: list[TrajectoryGroup]) -> Batch:
        config = self._executor.config
        return make_batch(
            groups,
            version=self._executor.version,
            pad_token_id=self._pad_token_id,
            segment_wise=config.enable_segment_wise_ppo,
            missing_proximal=config.missing_proximal,
            max_lag=config.max_head_lag if config.on_overdue == "mask" else None,
        )


def make_batch(
    groups: Sequence[TrajectoryGroup],
    *,
    version: int,
    pad_token_id: int,
    segment_wise: bool,
    missing_proximal: MissingProximal,
    max_lag: int | None,
) -> Batch:
    """The tensors of one step; without the segment-wise mode, those of standard decoupled PPO."""
    batch = collate(groups, version=version, pad_token_id=pad_token_id, segment_wise=segment_wise)
    if not segment_wise:
        return replace(batch, missing_proximal="decoupled")
    return replace(batch, missing_proximal=missing_proximal, max_lag=max_lag)


class Evaluation:
    """What rolling out a set of rows gave. Like a sealed batch, Lightning moves it whole.

    Attributes:
        version: of the policy that was evaluated.
        reward: mean over all trajectories.
        pass_at_k: share of rows of which a sample has reward 1 or more; None if each has only one.
        num_trajectories: how many.
    """

    __slots__ = ("num_trajectories", "pass_at_k", "reward", "version")

    def __init__(self, *, version: int, groups: Sequence[Sequence[float]]) -> None:
        rewards = [reward for group in groups for reward in group]
        self.version = version
        self.reward = math.fsum(rewards) / len(rewards)
        self.num_trajectories = len(rewards)
        passed = sum(max(group) >= 1 for group in groups) / len(groups)
        self.pass_at_k = passed if len(rewards) > len(groups) else None

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"reward": self.reward, "version": float(self.version)}
        return found if self.pass_at_k is None else found | {"pass_at_k": self.pass_at_k}

    def to(self, device: Any, *, non_blocking: bool = False) -> Evaluation:
        """Itself: nothing here lives on a device."""
        return self


class EvaluationLoader:
    """Rolls its rows out on the published version when it is iterated: one item, no training."""

    def __init__(
        self,
        executor: WorkflowExecutor,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        *,
        trainer: L.Trainer,
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        self._executor, self._rows, self._workflow = executor, rows, workflow
        self._trainer, self._ranks, self._stop = trainer, ranks, stop

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Evaluation]:
        require_published(self._executor)
        version = self._executor.version
        with ends_on_sigterm(self._trainer):
            _, parts = self._ranks.together(
                f"evaluating version {version}", self._roll_out_mine, lambda part: part
            )
        self._stop.obey(signum for _, signum in parts)
        groups = [rewards for part, _ in parts for rewards in part]
        if not groups:
            raise RolloutError(f"all {len(self._rows)} evaluation rows were rejected.")
        yield Evaluation(version=version, groups=groups)

    def _roll_out_mine(self) -> tuple[list[list[float]], int | None]:
        """Rewards of this rank's rows, and the signal that told to stop."""
        rows = self._rows[self._ranks.rank :: self._ranks.size]
        try:
            groups = self._executor.evaluate(rows, self._workflow, interrupted=self._is_interrupted)
        except RolloutTimeout:
            if self._stop.signum is None:
                raise
            groups = []
        return [[t.reward for t in group.trajectories] for group in groups], self._stop.signum

    def _is_interrupted(self) -> bool:
        return self._stop.look() or self._trainer.received_sigterm


def require_published(executor: WorkflowExecutor) -> None:
    """``ConfigError`` if there is nothing to sample with yet."""
    if not executor.is_published:
        raise ConfigError(
            "no weights were published to the engine, so it cannot sample: add "
            "WeightSyncCallback() to the Trainer's callbacks."
        )


@contextmanager
def ends_on_sigterm(trainer: L.Trainer) -> Generator[None]:
    """A wait that SIGTERM cut short ends in Lightning's exception for it."""
    try:
        yield
    except (RolloutTimeout, RankError) as error:
        if trainer.received_sigterm:
            raise SIGTERMException() from error
        raise


def _is_time_up(trainer: L.Trainer) -> bool:
    """Whether ``max_time`` is over, which Lightning asks after a step only."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)
