"""The loader of validate and test: rollouts of the published version and their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import lightning as L

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RolloutError, RolloutTimeout
from sdp_lightning.lightning.stop_request import (
    StopRequest,
    ends_on_sigterm,
    require_published,
)
from sdp_lightning.prompts.stream import EVALUATION_EPOCH, PromptRow
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.workflow import RolloutWorkflow

_IN_BAR = ("reward", "pass_at_k")
Rewards = tuple[float, Mapping[str, float]]  # of one trajectory; the second with names


class Evaluation:
    """Rewards of a batch of evaluation rows under one version. Lightning moves the object whole.

    Attributes:
        version: version of the evaluated policy.
        reward: mean over all trajectories.
        rewards: means of several rewards by name; empty for one.
        pass_at_k: share of rows with a sample of reward 1 or more; None with one sample a row.
        num_trajectories: number of trajectories.
        weights: by name of a metric, what its mean is over; a trajectory each if it is not there.
    """

    __slots__ = ("num_trajectories", "pass_at_k", "reward", "rewards", "version", "weights")

    def __init__(self, *, version: int, groups: Sequence[Sequence[Rewards]]) -> None:
        samples = [sample for group in groups for sample in group]
        self.version = version
        self.reward = _mean([reward for reward, _ in samples])
        names = sorted({name for _, named in samples for name in named})
        self.rewards = {
            name: _mean([named[name] for _, named in samples if name in named]) for name in names
        }
        self.num_trajectories = len(samples)
        self.weights = {
            f"reward/{name}": sum(name in named for _, named in samples) for name in names
        } | {"pass_at_k": len(groups)}
        passed = sum(max(reward for reward, _ in group) >= 1 for group in groups) / len(groups)
        self.pass_at_k = passed if len(samples) > len(groups) else None

    def __len__(self) -> int:
        return self.num_trajectories

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics to log, by name."""
        values = {"reward": self.reward, "version": float(self.version)}
        values |= {f"reward/{name}": mean for name, mean in self.rewards.items()}
        return values if self.pass_at_k is None else values | {"pass_at_k": self.pass_at_k}

    def log(self, log: Callable[..., None], stage: str) -> None:
        """Log the metrics by the ``log`` of a module: the same on all ranks, else it warns."""
        for name, value in self.metrics.items():
            log(
                f"{stage}/{name}",
                value,
                prog_bar=name in _IN_BAR,
                batch_size=self.weights.get(name, self.num_trajectories),
                reduce_fx="max" if name == "version" else "mean",  # which rounds large numbers
                sync_dist=True,
            )

    def to(self, device: Any, *, non_blocking: bool = False) -> Evaluation:
        """The object itself: it holds no tensors."""
        return self


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class EvaluationLoader:
    """Rolls its rows out on the published version when it is iterated, without training.

    A batch is as many rows as a training batch has. All rows that ``limit_val_batches``, or the
    limit of another stage, lets through are rolled out together; a batch is handed out when so many
    have finished.
    """

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
        self._batch_size = executor.config.batch_size * ranks.size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Evaluation]:
        require_published(self._executor)
        version = self._executor.version
        mine = self._shares(self._num_batches())
        rolled = self._roll_out([index for share in mine for index in share], [*map(len, mine)])
        is_empty = True
        with closing(rolled):
            for _ in mine:
                with ends_on_sigterm(self._trainer):
                    _, parts = self._ranks.run_on_all_ranks(
                        f"evaluating version {version}",
                        lambda: (self._next(rolled), self._stop.signum),
                        lambda part: part,
                    )
                self._stop.obey(signum for _, signum in parts)
                groups = [group for part, _ in parts for group in part]
                if groups:
                    is_empty = False
                    yield Evaluation(version=version, groups=groups)
        if is_empty:
            raise RolloutError(f"all {len(self._rows)} evaluation rows were rejected.")

    def _num_batches(self) -> int:
        """Batches that the Trainer takes, of this stage."""
        trainer = self._trainer
        if trainer.sanity_checking:
            limits = trainer.num_sanity_val_batches
        else:
            limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        return int(min(len(self), *limits))

    def _shares(self, num_batches: int) -> list[range]:
        """Indices of this rank's rows of each batch."""
        size = self._batch_size
        ends = [min(len(self._rows), (k + 1) * size) for k in range(num_batches)]
        starts = [k * size + self._ranks.rank for k in range(num_batches)]
        return [range(*ends_of, self._ranks.size) for ends_of in zip(starts, ends, strict=True)]

    def _roll_out(
        self, indices: Sequence[int], sizes: Sequence[int]
    ) -> Generator[list[TrajectoryGroup]]:
        # A slice of a datasets.Dataset is columns.
        prompts = [PromptRow(EVALUATION_EPOCH, index, self._rows[index]) for index in indices]
        return self._executor.evaluator.roll_out_in_parts(
            prompts, self._workflow, sizes, interrupted=self._is_interrupted
        )

    def _next(self, rolled: Iterator[list[TrajectoryGroup]]) -> list[list[Rewards]]:
        """Rewards of the rows of this rank that finished next; none if a signal asks to stop."""
        try:
            groups = next(rolled)
        except RolloutTimeout:
            if self._stop.signum is None:
                raise
            groups = []
        return [[(t.reward, t.rewards) for t in group.attempts] for group in groups]

    def _is_interrupted(self) -> bool:
        return self._stop.look() or self._trainer.received_sigterm
