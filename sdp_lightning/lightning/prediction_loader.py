"""Rollouts without training: what ``Trainer.predict`` iterates over."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import RolloutError
from sdp_lightning.lightning.rollout_hooks import texts_of
from sdp_lightning.lightning.stop_request import ends_on_sigterm, require_published
from sdp_lightning.prompts.stream import PromptRow, PromptStream
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.types import Row, TrajectoryGroup
from sdp_lightning.workflows.workflow import RolloutWorkflow, Tokenizer

logger = logging.getLogger(__name__)


class Rollouts:
    """Groups that are generated and not trained on. Lightning moves the object whole.

    Attributes:
        version: version of the policy that sampled them.
        groups: groups in the order of their prompts.
        places: (epoch, index) of the dataset row of every group.
        rows: the dataset row of every group.
        texts: of every group, the completions of its trajectories: what follows the prompt,
            without special tokens.
    """

    __slots__ = ("groups", "places", "rows", "texts", "version")

    def __init__(
        self,
        version: int,
        groups: Sequence[TrajectoryGroup],
        prompts: Sequence[PromptRow],
        tokenizer: Tokenizer,
    ) -> None:
        self.version, self.groups = version, tuple(groups)
        self.places = tuple((prompt.epoch, prompt.index) for prompt in prompts)
        self.rows: tuple[Row, ...] = tuple(prompt.data for prompt in prompts)
        self.texts = tuple(
            tuple(texts_of(each, tokenizer)[1] for each in group.trajectories)
            for group in self.groups
        )

    def __len__(self) -> int:
        """Number of trajectories."""
        return sum(len(group.trajectories) for group in self.groups)

    def to(self, device: Any, *, non_blocking: bool = False) -> Rollouts:
        """The object itself: it holds no tensors on a device."""
        return self


class GenerationLoader:
    """Rolls out prompts in their order of training, on the one version that was published.

    No ledger and no lag. Groups that a workflow rejects are left out, and the next prompts fill
    their places.

    Args:
        executor: executor of this process.
        rows: dataset.
        workflow: workflow of every rollout.
        tokenizer: of the policy.
        num_batches: number of batches; prompts repeat if they end before, at most ``num_epochs``
            times if that is set. None is one pass over them, or ``num_epochs``.
        trainer: polled for SIGTERM while waiting.
        ranks: rank group; each rank takes its share of the prompts.
    """

    def __init__(
        self,
        executor: WorkflowExecutor,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        *,
        tokenizer: Tokenizer,
        num_batches: int | None,
        trainer: L.Trainer,
        ranks: RankGroup,
    ) -> None:
        config = executor.config
        self._executor, self._trainer = executor, trainer
        self._workflow, self._size = workflow, config.batch_size
        self._tokenizer = tokenizer
        passes = config.num_epochs or (1 if num_batches is None else None)
        self._stream = PromptStream(
            rows,
            seed=config.seed,
            shuffle=config.shuffle,
            num_epochs=passes,
            rank=ranks.rank,
            num_ranks=ranks.size,
        )
        self._length = num_batches
        if passes is not None:  # on several ranks whole batches only: all have as many
            whole = len(rows) * passes // (self._size * ranks.size)
            there = whole if ranks.size > 1 else -(-len(rows) * passes // self._size)
            rest = len(rows) * passes - whole * self._size * ranks.size
            if rest and ranks.size > 1 and num_batches is None and ranks.rank == 0:
                logger.warning("predict leaves out the last %d rows: no batch for all ranks.", rest)
            self._length = there if num_batches is None else min(there, num_batches)

    def __len__(self) -> int:
        assert self._length is not None
        return self._length

    def __iter__(self) -> Iterator[Rollouts]:
        require_published(self._executor)
        done: list[TrajectoryGroup] = []
        rows: dict[int, PromptRow] = {}  # by order of their group
        rejected = 0
        for number in range(len(self)):
            while len(done) < self._size:
                missing = (len(self) - number) * self._size - len(done)
                drawn = self._draw(len(rows), min(missing, self._executor.config.concurrency))
                if not drawn:
                    break
                groups = self._roll_out(drawn)
                rows |= drawn
                rejected = 0 if groups else rejected + len(drawn)
                if rejected >= self._executor.config.max_rejected_in_a_row:
                    raise RolloutError(f"{rejected} groups in a row were rejected by the workflow.")
                done += groups
            batch, done = done[: self._size], done[self._size :]
            if not batch:
                return
            prompts = [rows[group.order] for group in batch]
            yield Rollouts(self._executor.version, batch, prompts, self._tokenizer)

    def _draw(self, first: int, count: int) -> dict[int, PromptRow]:
        """The next prompts, numbered from ``first``; fewer if they end."""
        drawn: dict[int, PromptRow] = {}
        while len(drawn) < count:
            row = self._stream.next()
            if row is None:
                break
            drawn[first + len(drawn)] = row
        return drawn

    def _roll_out(self, drawn: dict[int, PromptRow]) -> list[TrajectoryGroup]:
        with ends_on_sigterm(self._trainer):
            return self._executor.evaluator.roll_out(
                list(drawn.values()),
                self._workflow,
                first_order=min(drawn),
                interrupted=lambda: self._trainer.received_sigterm,
            )
