"""Forward passes of one policy over a batch: in micro-batches, and as many on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

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
Piece = tuple[Batch, list[int]]

_LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
# Of what another prefix does to log-probs, so much may be rounding. Rows that see each other are
# off by half of it and more, trained or not; rows that do not are equal on a CPU, in bfloat16 too.
_TOLERANCE = 0.1


class LogprobRunner:
    """Computes log-probs with one policy.

    Args:
        forward: the policy.
        update: micro-batches and layout.
        over_ranks: the values of each rank, given this one's.
        precision: the context in which passes without gradient run.
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

    def __call__(self, batch: Batch, layout: Layout) -> SequenceLogprobs:
        """One pass. Carries the gradient, where that is on."""
        return SequenceLogprobs(*self._forward(batch, layout))

    def layout(self, batch: Batch) -> Layout:
        """How the rows of ``batch`` are to be laid out.

        Each layout is tried on a few short rows before its first use. A sharded policy's trial is a
        collective.

        Raises:
            ConfigError: if the policy cannot do what was asked for.
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

    def cut(self, batch: Batch, layout: Layout) -> list[Piece]:
        """The micro-batches of ``batch``, each with its rows."""
        chosen = batch.microbatches(self._update.max_tokens_per_microbatch, layout, self._costs)
        return [(batch.select(rows), rows) for rows in chosen]

    @property
    def _costs(self) -> AttentionCosts:
        return attention_costs(self._forward.policy)

    def _refusal(self, layout: Layout) -> ConfigError | None:
        """Why the policy cannot be computed in a layout; found out once."""
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
                found, expected = (self(rows, each).logprobs for each in (layout, "padded"))
        except ConfigError as error:
            return error
        first, other = expected.split(len(rows) // 2)  # after one prefix, and after the other
        gap = (found - expected).abs().max().item()
        if gap < _TOLERANCE * (first - other).abs().max().item():
            return None
        return ConfigError(
            f"model type {policy.config.model_type!r} does not keep rows apart in the layout "
            f"{layout!r}: log-probs differ by {gap:.3g} nats from those of padded rows. "
            "Use layout='padded'."
        )

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32 under the present weights, without gradient; 0 outside the loss mask.

        A sharded policy's is a collective: the ranks with fewer micro-batches compute idle ones.
        """
        layout = self.layout(batch)
        out = torch.zeros_like(batch.behavior_logprobs)  # float32, also under bf16-true
        with torch.no_grad(), self._precision():
            pieces = self.cut(batch, layout)
            if is_sharded(self._forward):
                (most,) = max(self._over_ranks(len(pieces)))
                pieces = fill_up(pieces, batch, int(most))
            for part, rows in pieces:
                logprobs = self(part, layout).logprobs.float()
                out[rows] = torch.where(part.loss_mask, logprobs, out[rows])
        return out


def fill_up(pieces: list[Piece], batch: Batch, number: int) -> list[Piece]:
    """Idle micro-batches on top, so that there are ``number``: as many as on any other rank."""
    return pieces + [(batch.idle(), [0])] * (number - len(pieces))
