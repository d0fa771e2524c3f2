"""Forward passes of one policy over a batch: in micro-batches, and as many on every rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sdp_lightning.batch import Batch, Layout
from sdp_lightning.config import UpdateConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.forward import LogprobForward, SequenceLogprobs, check_model
from sdp_lightning.policy import is_sharded

Piece = tuple[Batch, list[int]]


class Passes:
    """Computes log-probs with one policy.

    Args:
        forward: the policy.
        update: micro-batches and layout.
        over_ranks: [R, n] the ``n`` values that each of R ranks gives.
        precision: the context in which passes without gradient run.
    """

    def __init__(
        self,
        forward: LogprobForward,
        update: UpdateConfig,
        *,
        over_ranks: Callable[..., Tensor],
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._forward, self._update = forward, update
        self._over_ranks, self._precision = over_ranks, precision

    def __call__(self, batch: Batch, layout: Layout) -> SequenceLogprobs:
        """One pass. Carries the gradient, where that is on."""
        return SequenceLogprobs(*self._forward(batch, layout))

    def layout(self, batch: Batch) -> Layout:
        """How the rows of ``batch`` are to be laid out."""
        if self._update.layout != "auto":
            return self._update.layout
        policy = self._forward.policy
        try:
            check_model(policy, "shared_prefix")
        except ConfigError:
            return "padded"
        return batch.cheapest_layout(self._update.max_tokens_per_microbatch, self._hidden_size)

    def cut(self, batch: Batch, layout: Layout) -> list[Piece]:
        """The micro-batches of ``batch``, each with its rows."""
        limit = self._update.max_tokens_per_microbatch
        chosen = batch.microbatches(limit, layout, self._hidden_size)
        return [(batch.select(rows), rows) for rows in chosen]

    @property
    def _hidden_size(self) -> int:
        return self._forward.policy.config.get_text_config(decoder=True).hidden_size

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] float32 under the present weights, without gradient; 0 outside the loss mask.

        A sharded policy's is a collective: the ranks with fewer micro-batches compute idle ones.
        """
        layout = self.layout(batch)
        out = torch.zeros_like(batch.behavior_logprobs)  # float32, also under bf16-true
        with torch.no_grad(), self._precision():
            pieces = self.cut(batch, layout)
            if is_sharded(self._forward):
                pieces = fill_up(pieces, batch, int(self._over_ranks(len(pieces)).max()))
            for part, rows in pieces:
                logprobs = self(part, layout).logprobs.float()
                out[rows] = torch.where(part.loss_mask, logprobs, out[rows])
        return out


def fill_up(pieces: list[Piece], batch: Batch, number: int) -> list[Piece]:
    """Idle micro-batches on top, so that there are ``number``: as many as on any other rank."""
    return pieces + [(batch.idle(), [0])] * (number - len(pieces))
