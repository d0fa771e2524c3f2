"""Forward passes of one policy over a batch: micro-batches, equally many on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_lightning.config import UpdateConfig
from sdp_lightning.training.batch import AttentionCosts, Batch, Layout
from sdp_lightning.training.policy.forward import (
    LogprobForward,
    SequenceLogprobs,
    attention_costs,
)
from sdp_lightning.training.policy.score_check import ScoreCheck, eager_attention
from sdp_lightning.training.policy.sharding import is_sharded

_PACKED: tuple[Layout, ...] = ("packed", "shared_prefix")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows that go through the policy in one forward pass.

    Args:
        batch: the rows.
        rows: their indices in the batch that was cut.
        layout: how they are laid out.
    """

    batch: Batch
    rows: list[int]
    layout: Layout = "padded"


class LogprobRunner:
    """Computes log-probs with one policy.

    Args:
        forward: the policy.
        update: micro-batches and layout.
        over_ranks: gathers values from every rank, in order of rank.
        precision: context of passes without gradient.
    """

    def __init__(
        self,
        forward: LogprobForward,
        update: UpdateConfig,
        *,
        over_ranks: Callable[..., list[tuple[float, ...]]],
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._forward, self._update = forward, update
        self._over_ranks, self._precision = over_ranks, precision
        wanted = update.layout
        others: list[Layout] = [each for each in _PACKED if wanted == "auto" or each == wanted]
        self._check = ScoreCheck(forward, others, over_ranks=over_ranks, precision=precision)

    def __call__(self, piece: MicroBatch) -> SequenceLogprobs:
        """One forward pass. Carries the gradient, where that is on."""
        return SequenceLogprobs(*self._forward(piece.batch, piece.layout))

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of ``batch``, in its :meth:`layout`."""
        layout = self.layout(batch)
        chosen = batch.microbatches(self._update.max_tokens_per_microbatch, layout, self._costs)
        return [MicroBatch(batch.select(rows), rows, layout) for rows in chosen]

    def layout(self, batch: Batch) -> Layout:
        """The configured layout, or the cheapest for ``batch``.

        Each layout is tried on a few rows before its first use, the padded one in any case. A
        sharded policy's trial is a collective.

        Raises:
            ConfigError: if the policy's scores are wrong, or it cannot be computed in the
                configured layout.
        """
        wanted, limit = self._update.layout, self._update.max_tokens_per_microbatch
        longest, total = int(batch.lengths.max()), int(batch.lengths.sum())
        refusals = self._check.refusals(longest=longest, together=min(total, max(longest, limit)))
        refusal = refusals["padded"] or (None if wanted == "auto" else refusals[wanted])
        if refusal is not None:
            raise refusal
        if wanted != "auto":
            return wanted
        able: list[Layout] = [layout for layout, refusal in refusals.items() if refusal is None]
        costs = self._costs
        return min(able, key=lambda layout: batch.cost(limit, layout, costs))

    @property
    def _costs(self) -> AttentionCosts:
        return attention_costs(self._forward.policy)

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32 under the present weights, without gradient; 0 outside the loss mask.

        A collective for a sharded policy: ranks with fewer micro-batches compute idle ones.
        """
        out = torch.zeros_like(batch.behavior_logprobs)  # float32, also under bf16-true
        pieces = self.cut(batch)
        with torch.no_grad(), self._precision():
            if is_sharded(self._forward):
                (most,) = max(self._over_ranks(len(pieces)))
                pieces = add_idle(pieces, int(most))
            for piece in pieces:
                logprobs = self(piece).logprobs.float()
                out[piece.rows] = torch.where(piece.batch.loss_mask, logprobs, out[piece.rows])
        return out

    def use_vocabulary(self, num_tokens: int | None) -> None:
        """Give token ids from ``num_tokens`` on, which are never sampled, probability 0."""
        self._forward.num_tokens = num_tokens

    def whole_vocabulary(self) -> AbstractContextManager[None]:
        """Context in which tokens that are never sampled have a probability, too."""
        return self._forward.whole_vocabulary()

    def own_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] as :meth:`logprobs`, but by the model's own logits: a second opinion.

        In eval mode, with eager attention, each row alone.
        """
        policy = self._forward.policy
        modes = {module: module.training for module in policy.modules()}
        policy.eval()
        try:
            with torch.no_grad(), self._precision(), eager_attention(policy):
                return self._forward(batch, "alone")[0]
        finally:
            for module, mode in modes.items():
                module.training = mode


def add_idle(pieces: Sequence[MicroBatch], number: int) -> list[MicroBatch]:
    """Adds micro-batches without a token to train, up to ``number``: as many as any rank has."""
    first = pieces[0]
    idle = MicroBatch(first.batch.idle(), [first.rows[0]], first.layout)
    return [*pieces, *[idle] * (number - len(pieces))]
