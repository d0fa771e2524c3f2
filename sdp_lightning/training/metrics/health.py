"""Health warnings: metrics beyond a bound, in words, with the remedy.

A metric that was not logged is not judged.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sdp_lightning.training.metrics.names import LAG_NAMES, MetricRow

logger = logging.getLogger(__name__)

LEAST_TOKENS = 100  # a lag with fewer is not judged

LOWEST_ESS = 0.3
LARGEST_BRIDGE = 0.1  # nats, mean
LARGEST_MISMATCH = 0.05  # nats, mean; bfloat16 engines are at some 0.01 to 0.03
LARGEST_REJECTED = 0.2
LARGEST_CLIPPED = 0.4
LARGEST_MASKED = 0.5
FRESHER = "lower max_head_lag or max_concurrent"


@dataclass(frozen=True)
class HealthWarning:
    """One metric that is beyond its bound.

    Args:
        kind: stable name of the warning.
        text: the value, the bound, and the remedy.
    """

    kind: str
    text: str


def health_warnings(metrics: MetricRow, *, leaves_bridge_out: bool = False) -> list[HealthWarning]:
    """Warnings about a run, about the worst lag where one is named; empty if all is well.

    Kinds: ``low_ess``, ``large_bridge``, ``engine_mismatch``, ``many_rejected``, ``many_clipped``,
    ``clamped``, ``many_masked``.

    Args:
        metrics: values that :class:`~sdp_lightning.training.metrics.LagMetrics` computes.
        leaves_bridge_out: ``LossConfig.bends_bridge``: only then does a large bridge bias the
            weights.
    """
    candidates = (
        _low_ess(metrics),
        _large_bridge(metrics) if leaves_bridge_out else None,
        _mismatch(metrics),
        _rejected(metrics),
        _clipped(metrics),
        _far_tokens(metrics),
        _masked(metrics),
    )
    return [warning for warning in candidates if warning is not None]


class HealthLog:
    """Logs each kind of health warning once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def warn(self, metrics: MetricRow, *, leaves_bridge_out: bool = False) -> None:
        """Log the warnings of kinds that were not logged before."""
        for warning in health_warnings(metrics, leaves_bridge_out=leaves_bridge_out):
            if warning.kind not in self._logged:
                self._logged.add(warning.kind)
                logger.warning("%s (%s; said once)", warning.text, warning.kind)


def _low_ess(metrics: MetricRow) -> HealthWarning | None:
    values = _of_lags(metrics, "ess/token")
    lag = min(values, key=lambda k: values[k], default=None)
    if lag is None or values[lag] >= LOWEST_ESS:
        return None
    return HealthWarning(
        "low_ess",
        f"the effective sample size at {_label(lag)} is {values[lag]:.2f} of its tokens (least "
        f"{LOWEST_ESS}): a few of them decide the gradient. To keep them fresher {FRESHER}; "
        "or lower lr or behavior_weight_cap, or set optimizer.scale_lr_by_ess.",
    )


def _large_bridge(metrics: MetricRow) -> HealthWarning | None:
    values = _of_lags(metrics, "bridge/abs_log_mean", first=2)
    lag = max(values, key=lambda k: values[k], default=None)
    if lag is None or values[lag] <= LARGEST_BRIDGE:
        return None
    return HealthWarning(
        "large_bridge",
        f"the bridge at {_label(lag)} is {values[lag]:.2f} nats in the mean (most "
        f"{LARGEST_BRIDGE}), and this estimator does not take it whole: its weights are off by as "
        "much. Use trust_region='segment' or bridge_exponent=1 without bridge_cap, or "
        f"{FRESHER}.",
    )


def _mismatch(metrics: MetricRow) -> HealthWarning | None:
    value = metrics.get("mismatch/abs_log_mean", 0.0)
    if _num_tokens(metrics, "0") < LEAST_TOKENS or value <= LARGEST_MISMATCH:
        return None
    return HealthWarning(
        "engine_mismatch",
        f"engine and trainer disagree on the tokens of lag 0 by {value:.3f} nats in the mean (most "
        f"{LARGEST_MISMATCH}), which is no staleness. Compare their dtype, temperature, tokenizer "
        "and weights; weight_check_every of WeightSyncCallback checks what was published. A "
        "quantized engine will differ: keep trust_region='segment' and "
        "segment_proximal='scored', a centre that the trainer computes.",
    )


def _rejected(metrics: MetricRow) -> HealthWarning | None:
    value = metrics.get("loss/rejected_fraction", 0.0)
    if value <= LARGEST_REJECTED:
        return None
    return HealthWarning(
        "many_rejected",
        f"{value:.0%} of the tokens are left out of the loss (most {LARGEST_REJECTED:.0%}). Raise "
        f"behavior_weight_cap or lower behavior_weight_floor, or {FRESHER}.",
    )


def _clipped(metrics: MetricRow) -> HealthWarning | None:
    value = metrics.get("loss/clip_fraction", 0.0)
    if value <= LARGEST_CLIPPED:
        return None
    return HealthWarning(
        "many_clipped",
        f"{value:.0%} of the ratios are clipped (most {LARGEST_CLIPPED:.0%}): these tokens have "
        "no gradient. Lower lr, num_epochs or num_minibatches, or raise clip_epsilon.",
    )


def _far_tokens(metrics: MetricRow) -> HealthWarning | None:
    value = metrics.get("drift/clamped_share", 0.0)
    if value <= 0:
        return None
    return HealthWarning(
        "clamped",
        f"{value:.2%} of the tokens are over 20 nats more or less likely to the trainer than to "
        "the engine. Look for sampling that the trainer does not know of (top_p, masks, another "
        "temperature) and for a policy that has collapsed.",
    )


def _masked(metrics: MetricRow) -> HealthWarning | None:
    value = metrics.get("train/truncated", 0.0)
    if not metrics.get("train/masked_truncated") or value <= LARGEST_MASKED:
        return None
    return HealthWarning(
        "many_masked",
        f"{value:.0%} of the trajectories are truncated, and mask_truncated leaves them out of the "
        f"loss (most {LARGEST_MASKED:.0%}): the rest trains it. Raise max_new_tokens (or max_turns "
        "and max_total_tokens), or set mask_truncated=False with a penalty for length.",
    )


def _of_lags(metrics: MetricRow, name: str, *, first: int = 0) -> dict[str, float]:
    """Values of a metric for the lags that have enough tokens."""
    return {
        lag: metrics[f"{name}_{lag}"]
        for lag in LAG_NAMES[first:]
        if f"{name}_{lag}" in metrics and _num_tokens(metrics, lag) >= LEAST_TOKENS
    }


def _num_tokens(metrics: MetricRow, lag: str) -> float:
    return metrics.get(f"lag/tokens_{lag}", 0.0)


def _label(lag: str) -> str:
    return f"lag {lag.replace('plus', '+')}"
