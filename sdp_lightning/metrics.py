"""What a training step did to tokens of every lag, as sums over micro-batches and ranks.

Pure functions add up and divide; the ``Metric`` around them only holds the sums, so that reducing
over ranks is exact. Shapes: B trajectories, T tokens. Lags are in policy versions, log-probs in
nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sdp_lightning.batch import Batch
from sdp_lightning.objective.losses import PolicyLoss

LAG_BINS = 5  # 0, 1, 2, 3, and 4 or more
BRIDGE_LOW, BRIDGE_DECADES, BINS_PER_DECADE = 1e-6, 8, 32  # nats; below counts as none
BRIDGE_BINS = BRIDGE_DECADES * BINS_PER_DECADE + 2
_LAG_NAMES = (*(str(lag) for lag in range(LAG_BINS - 1)), f"{LAG_BINS - 1}plus")

_SUMS = (
    "tokens",
    "lag",
    "kept",
    "weight",
    "clipped",
    "entropy",
    "known",
    "bridge",
    "approximated",
    "drift",
    "k1",
)


class LagMetrics(Metric):
    """Lag shares, behavior weight, clipping, rejection, bridge and drift of one training step.

    ``compute`` gives float tensors under these names, all 0 where there is no token:

    - ``lag/mean``, ``lag/max``, ``lag/share_0`` to ``lag/share_3``, ``lag/share_4plus``;
    - ``loss/behavior_weight`` and ``loss/clip_fraction``, over kept tokens;
      ``loss/rejected_fraction`` and ``loss/entropy``, over all loss tokens;
    - ``bridge/abs_log_mean``, ``bridge/abs_log_p95``: abs(x - q) where q is known: for tokens
      of lag 0 and 1 and the scored ones. The percentile is that of a histogram with 32 bins a
      decade (within 4 %), 0 below 1e-6. The same of tokens of one lag, where it is not 0 by
      definition: ``bridge/abs_log_mean_2``, ``_3``, ``_4plus`` and ``bridge/abs_log_p95_2``, ...
      ``bridge/approximated_share``: the tokens whose q is not known;
    - ``drift/abs_log_mean``: abs(x - b); ``drift/k1``: the mean of b - x, an estimate of
      KL(behavior || proximal).
    """

    full_state_update = False
    sums: Tensor
    lag_counts: Tensor
    lag_max: Tensor
    bridge_sums: Tensor
    bridge_counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts = torch.zeros(LAG_BINS, dtype=torch.long)
        self.add_state("sums", torch.zeros(len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lag_counts", counts, dist_reduce_fx="sum")
        self.add_state("lag_max", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")
        bridges = torch.zeros(LAG_BINS, dtype=torch.float64)
        self.add_state("bridge_sums", bridges, dist_reduce_fx="sum")
        histogram = torch.zeros(LAG_BINS, BRIDGE_BINS, dtype=torch.long)
        self.add_state("bridge_counts", histogram, dist_reduce_fx="sum")

    def update(
        self,
        batch: Batch,
        loss: PolicyLoss,
        proximal_logprobs: Tensor,
        segment_logprobs: Tensor,
        entropy: Tensor,
    ) -> None:
        """Add one micro-batch.

        Args:
            batch: what was trained on.
            loss: what the loss says of every token.
            proximal_logprobs: [B, T] x.
            segment_logprobs: [B, T] q, completed.
            entropy: [B, T] of the target policy.
        """
        known = batch.loss_mask & ((batch.lags <= 1) | batch.segment_scored)
        bridge = (proximal_logprobs - segment_logprobs).abs().detach()
        drift = (proximal_logprobs - batch.behavior_logprobs).detach()
        self.sums += _sums_update(batch, loss, bridge, drift, known, entropy.detach())
        self.lag_counts += _lag_counts_update(batch)
        self.lag_max = torch.maximum(self.lag_max, batch.lags.amax())
        lags = batch.lags[known].clamp(max=LAG_BINS - 1)
        self.bridge_sums.index_add_(0, lags, bridge[known].double())
        self.bridge_counts += _bridge_counts_update(bridge[known], lags)

    def pool(
        self, add_up: Callable[[Tensor], Tensor], other: Tensor, *, rank: int, num_ranks: int
    ) -> Tensor:
        """Make the states those of all ranks, at once: torchmetrics takes several rounds a state.

        Args:
            add_up: the sum of a tensor over ranks.
            other: [n] float64, to be added up along with them.
            rank: of this process.
            num_ranks: how many there are.

        Returns:
            [n] the sum of ``other``.
        """
        longest = self.sums.new_zeros(num_ranks)
        longest[rank] = self.lag_max
        states = (self.sums, self.lag_counts, self.bridge_sums, self.bridge_counts)
        parts = [*(state.double().flatten() for state in states), longest, other]
        added = add_up(torch.cat(parts)).split([part.numel() for part in parts])
        for state, part in zip(states, added, strict=False):
            state.copy_(part.view_as(state))
        self.lag_max.copy_(added[-2].max())
        return added[-1]

    def compute(self) -> dict[str, Tensor]:
        """The means, shares and percentile of everything added, under the names above."""
        return {
            **_means_compute(self.sums),
            **_lag_compute(self.lag_counts, self.lag_max),
            **_bridge_compute(self.bridge_sums, self.bridge_counts),
        }


def _sums_update(
    batch: Batch, loss: PolicyLoss, bridge: Tensor, drift: Tensor, known: Tensor, entropy: Tensor
) -> Tensor:
    """[len(_SUMS)] in the order of ``_SUMS``."""
    mask, kept = batch.loss_mask, loss.kept
    weight = torch.where(kept, loss.log_weight, 0.0).exp()
    values = {
        "tokens": mask,
        "lag": batch.lags,
        "kept": kept,
        "weight": torch.where(kept, weight, 0.0),
        "clipped": loss.clipped,
        "entropy": torch.where(mask, entropy, 0.0),
        "known": known,
        "bridge": torch.where(known, bridge, 0.0),
        "approximated": mask & ~known,
        "drift": torch.where(mask, drift.abs(), 0.0),
        "k1": torch.where(mask, -drift, 0.0),
    }
    return torch.stack([values[name].sum(dtype=torch.float64) for name in _SUMS])


def _lag_counts_update(batch: Batch) -> Tensor:
    """[LAG_BINS] tokens of each lag."""
    lags = batch.lags[batch.loss_mask].clamp(max=LAG_BINS - 1)
    return torch.bincount(lags, minlength=LAG_BINS)


def _bridge_counts_update(bridge: Tensor, lags: Tensor) -> Tensor:
    """[LAG_BINS, BRIDGE_BINS]: below the lowest edge, log-spaced bins, above the highest."""
    decades = (bridge.double() / BRIDGE_LOW).clamp(min=1e-9).log10()
    index = (decades * BINS_PER_DECADE).floor().long() + 1
    place = lags * BRIDGE_BINS + index.clamp(0, BRIDGE_BINS - 1)
    return torch.bincount(place, minlength=LAG_BINS * BRIDGE_BINS).view(LAG_BINS, BRIDGE_BINS)


def _means_compute(sums: Tensor) -> dict[str, Tensor]:
    total = dict(zip(_SUMS, sums.unbind(), strict=True))
    tokens, kept, known = (total[name].clamp(min=1) for name in ("tokens", "kept", "known"))
    means = {
        "lag/mean": total["lag"] / tokens,
        "loss/behavior_weight": total["weight"] / kept,
        "loss/clip_fraction": total["clipped"] / kept,
        "loss/rejected_fraction": (total["tokens"] - total["kept"]) / tokens,
        "loss/entropy": total["entropy"] / tokens,
        "bridge/abs_log_mean": total["bridge"] / known,
        "bridge/approximated_share": total["approximated"] / tokens,
        "drift/abs_log_mean": total["drift"] / tokens,
        "drift/k1": total["k1"] / tokens,
    }
    return {name: value.float() for name, value in means.items()}


def _lag_compute(counts: Tensor, longest: Tensor) -> dict[str, Tensor]:
    shares = (counts / counts.sum().clamp(min=1)).float()
    names = [f"lag/share_{lag}" for lag in _LAG_NAMES]
    return {"lag/max": longest.float(), **dict(zip(names, shares.unbind(), strict=True))}


def _bridge_compute(sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    means = (sums / counts.sum(1).clamp(min=1)).float()
    values = {"bridge/abs_log_p95": _percentile_compute(counts.sum(0), 0.95)}
    for lag in range(2, LAG_BINS):
        values[f"bridge/abs_log_mean_{_LAG_NAMES[lag]}"] = means[lag]
        values[f"bridge/abs_log_p95_{_LAG_NAMES[lag]}"] = _percentile_compute(counts[lag], 0.95)
    return values


def _percentile_compute(counts: Tensor, share: float) -> Tensor:
    """Middle, in logs, of the bin that holds the percentile; 0 for the lowest bin or no counts."""
    cumulative = counts.cumsum(0)
    index = torch.searchsorted(cumulative, (share * cumulative[-1:]).ceil().long())[0]
    exponent = math.log10(BRIDGE_LOW) + (index - 0.5) / BINS_PER_DECADE
    return torch.where(index > 0, 10.0**exponent, 0.0).float()
