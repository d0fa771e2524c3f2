"""The train loader: it waits in the trainer's thread for batches of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer

from sdp_lightning.config import MissingProximal, RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import ConfigError, RolloutError, RolloutTimeout
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.lightning.stop_request import (
    StopRequest,
    ends_on_sigterm,
    is_time_up,
    require_published,
)
from sdp_lightning.rewards.call_threads import THREADS
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.groups.telemetry import RolloutCounts
from sdp_lightning.training.batch import Batch, SealedBatch, collate
from sdp_lightning.types import TrajectoryGroup

_ENDLESS = 10**9  # batches


class RolloutLoader:
    """Pulls one batch a training step from the executor, as soon as it is ready.

    Args:
        executor: source of the groups.
        pad_token_id: token that pads a batch.
        length: batches of an epoch.
        trainer: polled for SIGTERM while waiting; stopped when prompts or time have ended.
        ranks: rank group; either all of its ranks take a batch or none.
        stop: polled before a batch is taken and while waiting for it.
        phase_timer: timer whose phase is ``"wait"`` while waiting.

    Attributes:
        ended: whether all prompts were handed out.
        counts: sums over all ranks, when the latest batch was taken.
    """

    def __init__(
        self,
        executor: WorkflowExecutor,
        *,
        pad_token_id: int,
        length: int,
        trainer: L.Trainer,
        ranks: RankGroup,
        stop: StopRequest,
        phase_timer: PhaseTimer,
    ) -> None:
        self.ended = False
        self.counts = RolloutCounts()
        self._generated = executor.engine.num_generated
        self._ranks, self._stop, self._phase_timer = ranks, stop, phase_timer
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
        self._trainer.should_stop = True  # or Lightning would begin one empty epoch after another

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves all. Lightning asks here whether a resume is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def _take(self) -> list[TrajectoryGroup] | None:
        self._phase_timer.enter("wait")
        with ends_on_sigterm(self._trainer):
            (groups, _), told = self._ranks.run_on_all_ranks(
                f"taking the batch of version {self._executor.version}",
                self._take_mine,
                self._tell,
            )
        self._stop.obey(signum for _, signum, *_ in told)
        self._phase_timer.enter("rest")
        self.counts = sum((counts for _, _, counts, _ in told), RolloutCounts())
        if any(ended for ended, *_ in told):
            return None
        _check_names([named for *_, named in told])
        return groups

    def _tell(
        self, taken: tuple[list[TrajectoryGroup] | None, int | None]
    ) -> tuple[bool, int | None, RolloutCounts, tuple[str, list[str]]]:
        """Whether prompts have ended, the signal, what is added up, and a row and its rewards.

        They need no meeting of their own.
        """
        executor, before = self._executor, self._generated
        self._generated = executor.engine.num_generated
        counts = RolloutCounts.from_ledger(
            executor.stat,
            executor.telemetry,
            workflow=executor.workflow.counts,
            generated=self._generated - before,
            calls=THREADS.load,
        )
        first = taken[0][0] if taken[0] else None
        named = (first.row_id, sorted(first.trajectories[0].rewards)) if first else ("", [])
        return taken[0] is None, taken[1], counts, named

    def _take_mine(self) -> tuple[list[TrajectoryGroup] | None, int | None]:
        """A batch, or None if prompts or time have ended; and the signal that told to stop."""
        try:
            if self._stop.look():
                return [], self._stop.signum
            groups = self._executor.take(interrupted=self._is_interrupted)
        except RolloutTimeout:
            if self._stop.signum is not None:
                return [], self._stop.signum
            if is_time_up(self._trainer):
                return None, None
            raise
        self.ended = groups is None
        return groups, None

    def _is_interrupted(self) -> bool:
        return self._stop.look() or self._trainer.received_sigterm or is_time_up(self._trainer)

    def _collate(self, groups: list[TrajectoryGroup]) -> Batch:
        config = self._executor.config
        return make_batch(
            groups,
            version=self._executor.version,
            pad_token_id=self._pad_token_id,
            segment_wise=config.enable_segment_wise_ppo,
            missing_proximal=config.missing_proximal,
            max_lag=config.max_token_lag,
        )


def _check_names(named: Sequence[tuple[str, list[str]]]) -> None:
    """Raise ``RolloutError`` if ranks have rewards of other names: their metrics would be mixed."""
    for rank, (row_id, names) in enumerate(named):
        if names != named[0][1]:
            raise RolloutError(
                f"row {row_id!r} of rank {rank} has rewards named {names}, and row "
                f"{named[0][0]!r} of rank 0 {named[0][1]}; the names must be the same for all rows."
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


def num_batches(trainer: L.Trainer, config: RolloutConfig, steps_per_batch: int) -> int:
    """Batches until ``max_steps``; no end in sight if ``max_time`` or ``num_epochs`` ends the run.

    Raises:
        ConfigError: if none of the three is set.
    """
    if trainer.max_steps > 0:
        return trainer.max_steps // steps_per_batch
    has_timer = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore
    if config.num_epochs is None and not has_timer:
        raise ConfigError(
            "nothing ends this run: set the Trainer's max_steps or max_time, or num_epochs of the "
            "RolloutConfig."
        )
    return _ENDLESS
