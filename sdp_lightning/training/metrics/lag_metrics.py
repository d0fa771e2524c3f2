"""Metric that adds up a training step over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import BatchLoss
from sdp_lightning.training.metrics.names import FAMILIES, LAG_BINS
from sdp_lightning.training.metrics.sums import (
    COLUMNS,
    HISTOGRAMS,
    NUM_BINS,
    SEQUENCE_COLUMNS,
    histogram_counts,
    sequence_sums,
    statistics,
    token_values,
)


class LagMetrics(Metric):
    """Statistics of a training step, of all tokens and of those of lag 0, 1, 2, 3 and 4 or more.

    ``compute`` gives float tensors, 0 where there is no token. A name stands for all tokens; with
    the suffix ``_0``, ``_1``, ``_2``, ``_3`` or ``_4plus`` for those of a lag, where marked [k]:

    - ``lag/mean``, ``lag/max``, ``lag/tokens``[k only] and their ``lag/share``[k only];
    - ``loss/behavior_weight``, ``loss/clip_fraction``, ``loss/clip_fraction_high``[k] (the ratio
      is above 1), ``loss/clip_fraction_low``[k] and ``weight/abs_log_mean``[k], ``_p99``[k] of the
      weight applied: over kept tokens. ``loss/rejected_fraction``[k], ``loss/entropy``[k]: over
      all tokens, as is the rest;
    - ``ess/token``[k]: (sum w)^2 / (n sum w^2) of the drift w = exp(x - b), which is the weight at
      the start of the step; 1 is on-policy. ``ess/sequence``[k]: of exp(sum of x - b) over a row,
      or over its tokens of lag k;
    - ``drift/abs_log_mean``[k], ``drift/abs_log_p99``[k]: abs(x - b). ``drift/k1``[k], the mean of
      b - x, and ``drift/k3``[k], of w - 1 - log w, estimate KL(behavior || proximal);
      ``drift/chi2``[k], the mean of w^2 less 1, the chi-square divergence;
    - ``mismatch/abs_log_mean``, ``mismatch/abs_log_p99``, ``mismatch/k1``: the drift at lag 0,
      where one policy is computed twice: by the engine and by the trainer;
    - ``bridge/abs_log_mean``, ``bridge/abs_log_p95``: abs(x - q) where q is known: for tokens of
      lag 0 and 1 and the scored ones; ``bridge/approximated_share``: the other tokens. By lag from
      2 on: before, it is 0 by definition.

    Percentiles are of histograms with 32 bins a decade from 1e-6 to 100 nats: within 4 %, 0 below
    and 104 above. Logs are clamped to 20 nats either way before exp (abs logs and k1 are not), so
    no sum becomes infinite. ``drift/clamped_share`` and ``ess/clamped_sequences`` count the clamped
    tokens and sequences.
    """

    full_state_update = False
    sums: Tensor
    histograms: Tensor
    sequences: Tensor
    lag_max: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sums = torch.zeros(LAG_BINS, len(COLUMNS), dtype=torch.float64)
        counts = torch.zeros(len(HISTOGRAMS), LAG_BINS, NUM_BINS, dtype=torch.long)
        sequences = torch.zeros(1 + LAG_BINS, len(SEQUENCE_COLUMNS), dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.add_state("histograms", counts, dist_reduce_fx="sum")
        self.add_state("sequences", sequences, dist_reduce_fx="sum")
        self.add_state("lag_max", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")

    def update(self, batch: Batch, result: BatchLoss, entropy: Tensor) -> None:
        """Add one micro-batch, whose rows are whole sequences.

        Args:
            batch: the rows that were trained on.
            result: their loss, and the log-probs x and q that it was computed with.
            entropy: [B, T] entropy of the target policy, nats.
        """
        bins, values = token_values(batch, result, entropy)
        self.sums.index_add_(0, bins, values)
        self.histograms += histogram_counts(bins, values)
        self.sequences += sequence_sums(batch, result.proximal)
        self.lag_max = torch.maximum(self.lag_max, batch.lags.amax())

    def pool(
        self, add_up: Callable[[Tensor], Tensor], other: Tensor, *, rank: int, num_ranks: int
    ) -> Tensor:
        """Add up the states over all ranks in one reduction; torchmetrics needs several a state.

        Args:
            add_up: sums a tensor over ranks.
            other: [n] float64, summed along with the states.
            rank: rank of this process.
            num_ranks: number of ranks.

        Returns:
            [n] the sum of ``other``.
        """
        longest = self.sums.new_zeros(num_ranks)
        longest[rank] = self.lag_max
        states = (self.sums, self.histograms, self.sequences)
        parts = [*(state.double().flatten() for state in states), longest, other]
        added = add_up(torch.cat(parts)).split([part.numel() for part in parts])
        for state, part in zip(states, added, strict=False):
            state.copy_(part.view_as(state))
        self.lag_max.copy_(added[-2].max())
        return added[-1]

    def compute(self) -> dict[str, Tensor]:
        """Means, shares and percentiles of everything added, under the names above."""
        values = statistics(self.sums, self.histograms, self.sequences)
        values["lag/max"] = self.lag_max[None]
        return {
            name: values[family.name][index].float()
            for family in FAMILIES
            for name, index in family.names.items()
        }
