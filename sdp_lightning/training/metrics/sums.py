"""Sums and histograms of tokens by lag, with their means and percentiles.

Pure functions. Shapes: B trajectories, T tokens, N of them trained on, L lag bins, C columns.
Lags are in policy versions, log-probs in nats: b behavior, q segment proximal, x proximal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.objective.effective_sample_size import effective_share
from sdp_lightning.objective.kl import kl_of_log_ratio
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import BatchLoss
from sdp_lightning.training.metrics.names import LAG_BINS

LARGEST_LOG = 20.0  # nats; logs are clamped to it before exp, so that sums stay exact
LOWEST, DECADES, BINS_PER_DECADE = 1e-6, 8, 32  # nats; smaller values count as 0
NUM_BINS = DECADES * BINS_PER_DECADE + 2
HISTOGRAMS = ("weight", "drift", "bridge")  # histograms of abs logs
COLUMNS = (
    *("tokens", "lag", "entropy", "kept", "rejected", "clipped", "clipped_high", "clipped_low"),
    *("weight", "abs_log_weight", "known", "approximated", "bridge"),
    *("abs_drift", "k1", "k3", "chi2", "drift_weight", "drift_weight_squared", "clamped"),
)
SEQUENCE_COLUMNS = ("sequences", "weight", "weight_squared", "clamped")
# {metric: (column that is averaged, column of counts)}.
_MEANS = {
    "lag/mean": ("lag", "tokens"),
    "loss/behavior_weight": ("weight", "kept"),
    "loss/clip_fraction": ("clipped", "kept"),
    "loss/clip_fraction_high": ("clipped_high", "kept"),
    "loss/clip_fraction_low": ("clipped_low", "kept"),
    "loss/rejected_fraction": ("rejected", "tokens"),
    "loss/entropy": ("entropy", "tokens"),
    "weight/abs_log_mean": ("abs_log_weight", "kept"),
    "drift/abs_log_mean": ("abs_drift", "tokens"),
    "drift/k1": ("k1", "tokens"),
    "drift/k3": ("k3", "tokens"),
    "drift/chi2": ("chi2", "tokens"),
    "drift/clamped_share": ("clamped", "tokens"),
    "bridge/abs_log_mean": ("bridge", "known"),
    "bridge/approximated_share": ("approximated", "tokens"),
}
_PERCENTILES = {
    "weight/abs_log_p99": ("weight", 99),
    "drift/abs_log_p99": ("drift", 99),
    "bridge/abs_log_p95": ("bridge", 95),
}
# At lag 0 engine and trainer have the same policy and differ in computation only.
_MISMATCH = ("abs_log_mean", "abs_log_p99", "k1")


def token_values(batch: Batch, result: BatchLoss, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """(bins [N] of the lags, values [N, C] float64 in the order of ``COLUMNS``)."""
    mask = batch.loss_mask

    def trained(values: Tensor) -> Tensor:
        return values.detach()[mask].double()

    lags = batch.lags[mask]
    loss, proximal = result.policy, result.proximal
    kept, clipped = loss.kept[mask], loss.clipped[mask]
    known = (lags <= 1) | batch.segment_scored[mask]
    log_weight, is_high = trained(loss.log_weight), loss.log_ratio.detach()[mask] > 0
    drift = trained(proximal - batch.behavior_logprobs)
    bounded = _clamped(drift)
    drift_weight, drift_weight_squared = _weight_and_square(bounded)
    values = {
        "tokens": torch.ones_like(lags),
        "lag": lags,
        "entropy": trained(entropy),
        "kept": kept,
        "rejected": ~kept,
        "clipped": clipped,
        "clipped_high": clipped & is_high,
        "clipped_low": clipped & ~is_high,
        "weight": torch.where(kept, _clamped(log_weight).exp(), 0.0),
        "abs_log_weight": torch.where(kept, log_weight.abs(), 0.0),
        "known": known,
        "approximated": ~known,
        "bridge": torch.where(known, trained(proximal - result.segment).abs(), 0.0),
        "abs_drift": drift.abs(),
        "k1": kl_of_log_ratio(drift, "k1"),
        "k3": kl_of_log_ratio(bounded, "k3"),
        "chi2": (2 * bounded).expm1(),
        "drift_weight": drift_weight,
        "drift_weight_squared": drift_weight_squared,
        "clamped": bounded != drift,
    }
    return lags.clamp(max=LAG_BINS - 1), torch.stack([values[c].double() for c in COLUMNS], 1)


def histogram_counts(bins: Tensor, values: Tensor) -> Tensor:
    """[H, L, NUM_BINS] int64 counts of tokens by abs log, in the order of ``HISTOGRAMS``.

    Args:
        bins: [N] lag bins.
        values: [N, C] columns of :func:`token_values`.
    """
    columns = dict(zip(COLUMNS, values.unbind(1), strict=True))
    counts: dict[str, Tensor] = {
        "weight": _counts(columns["abs_log_weight"], columns["kept"] > 0, bins),
        "drift": _counts(columns["abs_drift"], columns["tokens"] > 0, bins),
        "bridge": _counts(columns["bridge"], columns["known"] > 0, bins),
    }
    return torch.stack([counts[name] for name in HISTOGRAMS])


def sequence_sums(batch: Batch, proximal: Tensor) -> Tensor:
    """[1 + L, len(SEQUENCE_COLUMNS)] float64: sums over rows, then over their tokens of each lag.

    Rows without such tokens are left out.
    """
    drift = torch.where(batch.loss_mask, (proximal - batch.behavior_logprobs).detach(), 0.0)
    bins = batch.lags.clamp(0, LAG_BINS - 1)
    parts = drift.new_zeros(len(drift), LAG_BINS, dtype=torch.float64)
    logs = parts.scatter_add(1, bins, drift.double())
    counts = parts.scatter_add(1, bins, batch.loss_mask.double())
    logs, counts = (torch.cat([p.sum(1, keepdim=True), p], 1) for p in (logs, counts))
    bounded, occupied = _clamped(logs), counts > 0
    columns = (torch.ones_like(logs), *_weight_and_square(bounded), bounded != logs)
    return torch.stack([torch.where(occupied, column, 0.0).sum(0) for column in columns], 1)


def drift_moments(batch: Batch, proximal: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares of the drift exp(x - b) of the trained tokens."""
    drift = (proximal - batch.behavior_logprobs).detach()[batch.loss_mask].double()
    columns = (torch.ones_like(drift), *_weight_and_square(_clamped(drift)))
    return torch.stack(columns).sum(1)


def statistics(sums: Tensor, histograms: Tensor, sequences: Tensor) -> dict[str, Tensor]:
    """Every statistic but the largest lag: [1 + L] for all tokens and each lag, or [1].

    Args:
        sums: [L, C].
        histograms: [H, L, NUM_BINS].
        sequences: [1 + L, len(SEQUENCE_COLUMNS)].
    """
    table = torch.cat([sums.sum(0, keepdim=True), sums])
    total = dict(zip(COLUMNS, table.unbind(1), strict=True))
    counts = torch.cat([histograms.sum(1, keepdim=True), histograms], 1)
    of: dict[str, Tensor] = dict(zip(HISTOGRAMS, counts.unbind(), strict=True))
    rows = dict(zip(SEQUENCE_COLUMNS, sequences.unbind(1), strict=True))
    values = {
        "lag/tokens": total["tokens"],
        "lag/share": _ratio(total["tokens"], total["tokens"][0]),
        **{name: _ratio(total[column], total[count]) for name, (column, count) in _MEANS.items()},
        **{name: percentile(of[kind], percent) for name, (kind, percent) in _PERCENTILES.items()},
        "ess/token": effective_share(
            total["tokens"], total["drift_weight"], total["drift_weight_squared"]
        ),
        "ess/sequence": effective_share(rows["sequences"], rows["weight"], rows["weight_squared"]),
        "ess/clamped_sequences": _ratio(rows["clamped"], rows["sequences"]),
    }
    return values | {f"mismatch/{name}": values[f"drift/{name}"][1:2] for name in _MISMATCH}


def percentile(counts: Tensor, percent: int) -> Tensor:
    """[M] percentiles of histograms [M, NUM_BINS]: the middle, in logs, of the bin that has it.

    0 for the lowest bin and where there are no counts.
    """
    cumulative = counts.cumsum(1)
    rank = (percent * cumulative[:, -1:] + 99) // 100  # rounded up
    index = torch.searchsorted(cumulative, rank)[:, 0]
    exponent = math.log10(LOWEST) + (index - 0.5) / BINS_PER_DECADE
    return torch.where(index > 0, 10.0 ** exponent.double(), 0.0)


def _clamped(logs: Tensor) -> Tensor:
    return logs.clamp(-LARGEST_LOG, LARGEST_LOG)


def _weight_and_square(bounded: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of clamped log-weights, and their squares."""
    return bounded.exp(), (2 * bounded).exp()


def _counts(sizes: Tensor, where: Tensor, bins: Tensor) -> Tensor:
    """[L, NUM_BINS] counts: below the lowest edge, log-spaced bins, above the highest."""
    decades = (sizes / LOWEST).clamp(1e-9, 1e12).log10()
    index = (decades * BINS_PER_DECADE).floor().long() + 1
    slot = bins * NUM_BINS + index.clamp(0, NUM_BINS - 1)
    return torch.bincount(slot[where], minlength=LAG_BINS * NUM_BINS).view(LAG_BINS, NUM_BINS)


def _ratio(value: Tensor, count: Tensor) -> Tensor:
    return value / count.clamp(min=1)
