"""Forward passes of one policy over a batch: micro-batches, equally many on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_lightning.config import UpdateConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import AttentionCosts, Batch, Layout, trial_batch
from sdp_lightning.training.policy.forward import (
    LogprobForward,
    SequenceLogprobs,
    attention_costs,
    check_model,
)
from sdp_lightning.training.policy.sharding import is_sharded

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
# Largest error of a layout, as a share of the change that another prefix makes. Rows that attend to
# each other are off by half of it and more; rows that do not are equal on a CPU, in bfloat16 too.
_TOLERANCE = 0.1


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
        self._refusals: dict[Layout, ConfigError | None] = {}

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

        Each layout is tried on a few short rows before its first use. A sharded policy's trial is a
        collective.

        Raises:
            ConfigError: if the policy cannot be computed in the configured layout.
        """
        wanted = self._update.layout
        refusal = self._refusal("padded" if wanted == "auto" else wanted)
        if refusal is not None:
            raise refusal
        if wanted != "auto":
            return wanted
        able: list[Layout] = [layout for layout in _LAYOUTS if self._refusal(layout) is None]
        limit, costs = self._update.max_tokens_per_microbatch, self._costs
        return min(able, key=lambda layout: batch.cost(limit, layout, costs))

    @property
    def _costs(self) -> AttentionCosts:
        return attention_costs(self._forward.policy)

    def _refusal(self, layout: Layout) -> ConfigError | None:
        """Why the policy cannot be computed in a layout, or None; tried once."""
        if layout not in self._refusals:
            self._refusals[layout] = self._try(layout)
        refusal = self._refusals[layout]
        if refusal is not None:
            logger.debug("layout %r is not used: %s", layout, refusal)
        return refusal

    def _try(self, layout: Layout) -> ConfigError | None:
        policy = self._forward.policy
        rows = trial_batch(policy.config.get_text_config(decoder=True).vocab_size)
        rows = rows.to(policy.device)
        try:
            check_model(policy, layout)
            if layout == "padded":
                return None
            with torch.no_grad(), self._precision():
                actual, expected = (self._forward(rows, each)[0] for each in (layout, "padded"))
        except ConfigError as error:
            return error
        first, other = expected.split(len(rows) // 2)  # after one prefix, and after the other
        gap = (actual - expected).abs().max().item()
        if gap < _TOLERANCE * (first - other).abs().max().item():
            return None
        return ConfigError(
            f"model type {policy.config.model_type!r} does not keep rows apart in the layout "
            f"{layout!r}: log-probs differ by {gap:.3g} nats from those of padded rows. "
            "Use layout='padded'."
        )

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


def add_idle(pieces: Sequence[MicroBatch], number: int) -> list[MicroBatch]:
    """Adds micro-batches without a token to train, up to ``number``: as many as any rank has."""
    first = pieces[0]
    idle = MicroBatch(first.batch.idle(), [first.rows[0]], first.layout)
    return [*pieces, *[idle] * (number - len(pieces))]
