"""What the Trainer iterates over: batches of rollouts, and one evaluation.

Both wait for rollouts in the trainer's thread, and end when the process is told to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.batch import Batch, SealedBatch, collate
from sdp_lightning.errors import ConfigError, RolloutError, RolloutTimeout
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.types import TrajectoryGroup
from sdp_lightning.workflows.base import RolloutWorkflow, Row


class RolloutLoader:
    """Pulls one batch a training step from the executor, as soon as it is ready.

    Args:
        executor: where rollouts are.
        pad_token_id: for the padding of a batch.
        length: how many batches an epoch has.
        trainer: asked for SIGTERM while waiting, and told when the prompts have ended.
    """

    def __init__(
        self, executor: WorkflowExecutor, *, pad_token_id: int, length: int, trainer: L.Trainer
    ) -> None:
        self.last_wait_s = 0.0
        self._executor, self._pad_token_id = executor, pad_token_id
        self._length, self._trainer = length, trainer
        self._ended = False

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SealedBatch]:
        _require_published(self._executor)
        if self._ended:
            raise RolloutError(
                "the prompts have ended, but the Trainer goes on: leave out its min_steps and "
                "min_epochs, or raise num_epochs of the RolloutConfig."
            )
        while (groups := self._take()) is not None:
            yield SealedBatch(self._collate(groups))
        self._ended = True
        self._trainer.should_stop = True  # else Lightning begins one empty epoch after another

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module has it all. Lightning asks here whether a resume is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def _take(self) -> list[TrajectoryGroup] | None:
        start = time.monotonic()
        with _ends_on_sigterm(self._trainer):
            groups = self._executor.take(interrupted=lambda: self._trainer.received_sigterm)
        self.last_wait_s = time.monotonic() - start
        return groups

    def _collate(self, groups: list[TrajectoryGroup]) -> Batch:
        config = self._executor.config
        batch = collate(
            groups,
            version=self._executor.version,
            pad_token_id=self._pad_token_id,
            segment_wise=config.enable_segment_wise_ppo,
        )
        if not config.enable_segment_wise_ppo:
            return replace(batch, missing_proximal="decoupled")
        return replace(
            batch,
            missing_proximal=config.missing_proximal,
            max_lag=config.max_head_lag if config.on_overdue == "mask" else None,
        )


class Evaluation:
    """What rolling out a set of rows gave. Like a sealed batch, Lightning moves it whole.

    Attributes:
        version: of the policy that was evaluated.
        reward: mean over all trajectories.
        num_trajectories: how many.
    """

    __slots__ = ("num_trajectories", "reward", "version")

    def __init__(self, *, version: int, rewards: Sequence[float]) -> None:
        self.version = version
        self.reward = math.fsum(rewards) / len(rewards)
        self.num_trajectories = len(rewards)

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
    ) -> None:
        self._executor, self._rows, self._workflow = executor, rows, workflow
        self._trainer = trainer

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Evaluation]:
        _require_published(self._executor)
        version = self._executor.version
        with _ends_on_sigterm(self._trainer):
            groups = self._executor.evaluate(
                self._rows, self._workflow, interrupted=lambda: self._trainer.received_sigterm
            )
        rewards = [t.reward for group in groups for t in group.trajectories]
        if not rewards:
            raise RolloutError(f"all {len(self._rows)} evaluation rows were rejected.")
        yield Evaluation(version=version, rewards=rewards)


def _require_published(executor: WorkflowExecutor) -> None:
    if not executor.is_published:
        raise ConfigError(
            "no weights were published to the engine, so it cannot sample: add "
            "WeightSyncCallback() to the Trainer's callbacks."
        )


@contextmanager
def _ends_on_sigterm(trainer: L.Trainer) -> Generator[None]:
    """A wait that SIGTERM cut short ends in Lightning's exception for it."""
    try:
        yield
    except RolloutTimeout as error:
        if trainer.received_sigterm:
            raise SIGTERMException() from error
        raise
