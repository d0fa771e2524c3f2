"""The loader of validate and test: rollouts of the published version and their rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RolloutError, RolloutTimeout
from sdp_lightning.lightning.stop_request import (
    StopRequest,
    ends_on_sigterm,
    require_published,
)
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.types import Row
from sdp_lightning.workflows.workflow import RolloutWorkflow

Rewards = tuple[float, Mapping[str, float]]  # of one trajectory; the second with names


class Evaluation:
    """Rewards of the evaluation rows under one version. Lightning moves the object whole.

    Attributes:
        version: version of the evaluated policy.
        reward: mean over all trajectories.
        rewards: means of several rewards by name; empty for one.
        pass_at_k: share of rows with a sample of reward 1 or more; None with one sample a row.
        num_trajectories: number of trajectories.
    """

    __slots__ = ("num_trajectories", "pass_at_k", "reward", "rewards", "version")

    def __init__(self, *, version: int, groups: Sequence[Sequence[Rewards]]) -> None:
        samples = [sample for group in groups for sample in group]
        self.version = version
        self.reward = _mean([reward for reward, _ in samples])
        names = sorted({name for _, named in samples for name in named})
        self.rewards = {
            name: _mean([named[name] for _, named in samples if name in named]) for name in names
        }
        self.num_trajectories = len(samples)
        passed = sum(max(reward for reward, _ in group) >= 1 for group in groups) / len(groups)
        self.pass_at_k = passed if len(samples) > len(groups) else None

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics to log, by name."""
        values = {"reward": self.reward, "version": float(self.version)}
        values |= {f"reward/{name}": mean for name, mean in self.rewards.items()}
        return values if self.pass_at_k is None else values | {"pass_at_k": self.pass_at_k}

    def to(self, device: Any, *, non_blocking: bool = False) -> Evaluation:
        """The object itself: it holds no tensors."""
        return self


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class EvaluationLoader:
    """Rolls its rows out on the published version when it is iterated: one item, no training."""

    def __init__(
        self,
        executor: WorkflowExecutor,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        *,
        trainer: L.Trainer,
        ranks: RankGroup,
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
            _, parts = self._ranks.run_on_all_ranks(
                f"evaluating version {version}", self._roll_out_mine, lambda part: part
            )
        self._stop.obey(signum for _, signum in parts)
        groups = [group for part, _ in parts for group in part]
        if not groups:
            raise RolloutError(f"all {len(self._rows)} evaluation rows were rejected.")
        yield Evaluation(version=version, groups=groups)

    def _roll_out_mine(self) -> tuple[list[list[Rewards]], int | None]:
        """Rewards of this rank's rows, and the signal that asked to stop."""
        indices = range(self._ranks.rank, len(self._rows), self._ranks.size)
        rows = [self._rows[index] for index in indices]  # a slice of datasets.Dataset is columns
        try:
            groups = self._executor.evaluate(rows, self._workflow, interrupted=self._is_interrupted)
        except RolloutTimeout:
            if self._stop.signum is None:
                raise
            groups = []
        rewards = [[(t.reward, t.rewards) for t in group.trajectories] for group in groups]
        return rewards, self._stop.signum

    def _is_interrupted(self) -> bool:
        return self._stop.look() or self._trainer.received_sigterm
