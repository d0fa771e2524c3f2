"""The train loader: it waits in the trainer's thread for batches of rollouts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning as L

from sdp_lightning.config import MissingProximal, UpdateConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RolloutError, RolloutTimeout
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.lightning.prompt_epochs import PromptEpochs, count_over_run
from sdp_lightning.lightning.put_off_saves import Ask
from sdp_lightning.lightning.stop_request import (
    StopRequest,
    ends_on_sigterm,
    is_time_up,
    require_published,
)
from sdp_lightning.lightning.trainer_checks import check_steps
from sdp_lightning.rewards.call_threads import THREADS
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.groups.telemetry import RolloutCounts
from sdp_lightning.training.batch import Batch, SealedBatch, blank_batch, collate
from sdp_lightning.types import TrajectoryGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """A batch as ranks share it.

    Args:
        groups: groups of this rank; none while other ranks train their last ones.
        sizes: number of groups of every rank.
        reward_names: names of the rewards of all groups; empty for one reward.
    """

    groups: Sequence[TrajectoryGroup]
    sizes: Sequence[int]
    reward_names: Sequence[str] = ()


class _Taken(NamedTuple):
    """What a rank took: ``groups`` is None if its prompts have ended, with these ``is_last``."""

    groups: list[TrajectoryGroup] | None
    signum: int | None = None
    is_time_up: bool = False
    is_last: bool = False
    asked: tuple[Ask, ...] = ()


class _Told(NamedTuple):
    """What a rank tells the others of a :class:`_Taken`."""

    num_groups: int | None
    signum: int | None
    is_time_up: bool
    is_last: bool
    asked: tuple[Ask, ...]  # to be saved before the batch
    counts: RolloutCounts
    rewards: tuple[str, tuple[str, ...]] | None  # the first row, and the names of its rewards


class RolloutLoader:
    """Pulls one batch a training step from the executor, as soon as it is ready.

    Args:
        executor: source of the groups.
        pad_token_id: token that pads a batch.
        epochs: counts the groups of each epoch.
        trainer: polled for SIGTERM while waiting; stopped when prompts or time have ended.
        ranks: rank group; either all of its ranks train a batch or none.
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
        epochs: PromptEpochs,
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
        self._epochs, self._trainer = epochs, trainer
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def begin_epoch(self, update: UpdateConfig) -> None:
        """Find the length of the epoch that the trainer begins, or goes on with.

        Raises:
            ConfigError: if whole batches do not reach ``max_steps``.
        """
        check_steps(self._trainer, update)
        self._length = self._epochs.next_length(self._trainer, update.steps_per_batch)
        count_over_run(self._trainer, self._length)

    def __iter__(self) -> Iterator[SealedBatch]:
        require_published(self._executor)
        if self.ended:
            raise RolloutError(
                "the prompts have ended, but the Trainer goes on: leave out its min_steps and "
                "min_epochs, or raise num_epochs of the RolloutConfig."
            )
        while not self.ended and (shares := self._take()) is not None:
            self._epochs.take(sum(shares.sizes))
            if self.ended:  # with this batch, after which Lightning validates once more
                self._trainer.should_stop = True
            yield SealedBatch(self._collate(shares))
        self._trainer.should_stop = True  # or Lightning would begin one empty epoch after another

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves all. Lightning asks here whether a resume is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def _take(self) -> Shares | None:
        """The groups of this rank, and how many each rank has; None if the run ends."""
        self._phase_timer.enter("wait")
        version, last = self._executor.version, self._executor.config.last_batch
        with ends_on_sigterm(self._trainer):
            taken, told = self._meet(f"taking the batch of version {version}", self._take_mine)
            ended = [each.num_groups is None for each in told]
            if last == "fill" and any(ended) and not all(ended) and not _is_over(told):
                mine = taken
                taken, told = self._meet(
                    f"filling the batch of version {version}",
                    lambda: mine if mine.groups is not None else self._take_mine(fill=True),
                )
        self._phase_timer.enter("rest")
        self._generated = self._executor.engine.num_generated
        self.counts = sum((each.counts for each in told), RolloutCounts())
        self.ended = all(ended) or (last == "drop" and any(ended))
        if self.ended and self._ranks.rank == 0:
            self._warn_of_rest(told)
        if self.ended or _is_over(told):
            return None
        self.ended = all(each.is_last or each.num_groups is None for each in told)
        names = _common_names([each.rewards for each in told])
        return Shares(taken.groups or [], [each.num_groups or 0 for each in told], names)

    def _meet(self, what: str, take: Callable[[], _Taken]) -> tuple[_Taken, list[_Told]]:
        taken, told = self._ranks.run_on_all_ranks(what, take, self._tell)
        asked = [ask for each in told for ask in each.asked]
        self._stop.saves.perform(asked)
        self._stop.obey(each.signum for each in told)
        if not asked:
            return taken, told
        return self._meet(what, lambda: taken if taken.groups else take())

    def _tell(self, taken: _Taken) -> _Told:
        """What other ranks must know, and what is added up: no meeting of its own."""
        executor = self._executor
        counts = RolloutCounts.from_ledger(
            executor.stat,
            executor.telemetry,
            workflow=executor.workflow.counts,
            generated=executor.engine.num_generated - self._generated,
            calls=THREADS.load,
        )
        num_groups = None if taken.groups is None else len(taken.groups)
        first = taken.groups[0] if taken.groups else None
        rewards = first and (first.row_id, tuple(sorted(first.trajectories[0].rewards)))
        ends = taken.is_time_up, taken.is_last
        return _Told(num_groups, taken.signum, *ends, taken.asked, counts, rewards)

    def _take_mine(self, *, fill: bool = False) -> _Taken:
        saves = self._stop.saves
        try:
            if self._stop.look() or saves.asked:
                return _Taken([], self._stop.signum, asked=tuple(saves.asked))
            groups = self._executor.take(interrupted=self._is_interrupted, fill=fill)
            return _Taken(groups, is_last=self._executor.is_finished)
        except RolloutTimeout:
            if self._stop.signum is not None or saves.asked:
                return _Taken([], self._stop.signum, asked=tuple(saves.asked))
            if is_time_up(self._trainer):
                return _Taken([], is_time_up=True)
            raise

    def _warn_of_rest(self, told: Sequence[_Told]) -> None:
        rest = self.counts.pending + sum(each.num_groups or 0 for each in told)
        if rest:
            logger.warning(
                "the prompts have ended: the last %d groups are fewer than a batch, and are not "
                "trained on (last_batch='drop').",
                rest,
            )

    def _is_interrupted(self) -> bool:
        if self._stop.look() or self._stop.saves.asked or self._trainer.received_sigterm:
            return True
        return is_time_up(self._trainer)

    def _collate(self, shares: Shares) -> Batch:
        config = self._executor.config
        return make_batch(
            shares,
            version=self._executor.version,
            pad_token_id=self._pad_token_id,
            segment_wise=config.enable_segment_wise_ppo,
            missing_proximal=config.missing_proximal,
            max_lag=config.max_token_lag,
        )


def _common_names(rewards: Sequence[tuple[str, tuple[str, ...]] | None]) -> tuple[str, ...]:
    """The names of the rewards, the same on all ranks; else their metrics would be mixed.

    Raises:
        RolloutError: if they are not; names a row of each of two ranks.
    """
    known = [(rank, *each) for rank, each in enumerate(rewards) if each is not None]
    for rank, row_id, names in known:
        first, other, expected = known[0]
        if names != expected:
            raise RolloutError(
                f"row {row_id!r} of rank {rank} has rewards named {list(names)}, and row "
                f"{other!r} of rank {first} {list(expected)}; the names must be the same for all "
                "rows."
            )
    return known[0][2] if known else ()


def make_batch(
    shares: Shares,
    *,
    version: int,
    pad_token_id: int,
    segment_wise: bool,
    missing_proximal: MissingProximal,
    max_lag: int | None,
) -> Batch:
    """The tensors of one step; without the segment-wise mode, those of standard decoupled PPO."""
    batch = (
        collate(
            shares.groups, version=version, pad_token_id=pad_token_id, segment_wise=segment_wise
        )
        if shares.groups
        else blank_batch(version, shares.reward_names)
    )
    batch = replace(batch, most_groups=max(shares.sizes))
    if not segment_wise:
        return replace(batch, missing_proximal="decoupled")
    return replace(batch, missing_proximal=missing_proximal, max_lag=max_lag)


def _is_over(told: Sequence[_Told]) -> bool:
    return any(each.is_time_up for each in told)
