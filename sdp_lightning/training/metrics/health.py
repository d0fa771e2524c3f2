"""What the metrics of a run say about it, in words, with what to do about it.

Reads a mapping of metrics under their logged names; what is not in it is not judged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from sdp_lightning.training.metrics.names import LAG_NAMES

logger = logging.getLogger(__name__)

LEAST_TOKENS = 100  # of a lag, to judge it

LOWEST_ESS = 0.3
LARGEST_BRIDGE = 0.1  # nats, mean
LARGEST_MISMATCH = 0.05  # nats, mean; bfloat16 engines are at some 0.01 to 0.03
LARGEST_REJECTED = 0.2
LARGEST_CLIPPED = 0.4
FRESHER = "lower max_head_lag or max_concurrent"


@dataclass(frozen=True)
class Verdict:
    """One thing that is wrong.

    Args:
        kind: its name, stable.
        text: what was found, against which bound, and the remedy.
    """

    kind: str
    text: str


def verdicts(metrics: Mapping[str, float], *, leaves_bridge_out: bool = False) -> list[Verdict]:
    """What is wrong, worst lag first where one is named; nothing if all is well.

    ``low_ess``, ``large_bridge``, ``engine_mismatch``, ``many_rejected``, ``many_clipped``,
    ``clamped``.

    Args:
        metrics: by name, as :class:`~sdp_lightning.training.metrics.LagMetrics` computes them.
        leaves_bridge_out: whether the estimator takes exp(x - q) not whole, as with a
            ``bridge_exponent`` below 1: only then is a large bridge wrong.
    """
    found = (
        _low_ess(metrics),
        _large_bridge(metrics) if leaves_bridge_out else None,
        _mismatch(metrics),
        _rejected(metrics),
        _clipped(metrics),
        _far_tokens(metrics),
    )
    return [verdict for verdict in found if verdict is not None]


class Warner:
    """Logs every kind of verdict once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, metrics: Mapping[str, float], *, leaves_bridge_out: bool = False) -> None:
        """Log as warnings the verdicts whose kind was not logged before."""
        for verdict in verdicts(metrics, leaves_bridge_out=leaves_bridge_out):
            if verdict.kind not in self._said:
                self._said.add(verdict.kind)
                logger.warning("%s (%s; said once)", verdict.text, verdict.kind)


def _low_ess(metrics: Mapping[str, float]) -> Verdict | None:
    values = _of_lags(metrics, "ess/token")
    lag = min(values, key=lambda k: values[k], default=None)
    if lag is None or values[lag] >= LOWEST_ESS:
        return None
    return Verdict(
        "low_ess",
        f"the effective sample size at {_words(lag)} is {values[lag]:.2f} of its tokens (least "
        f"{LOWEST_ESS}): a few of them decide the gradient. To keep them fresher {FRESHER}; "
        "or lower lr or behavior_weight_cap, or set optimizer.scale_lr_by_ess.",
    )


def _large_bridge(metrics: Mapping[str, float]) -> Verdict | None:
    values = _of_lags(metrics, "bridge/abs_log_mean", first=2)
    lag = max(values, key=lambda k: values[k], default=None)
    if lag is None or values[lag] <= LARGEST_BRIDGE:
        return None
    return Verdict(
        "large_bridge",
        f"the bridge at {_words(lag)} is {values[lag]:.2f} nats in the mean (most "
        f"{LARGEST_BRIDGE}), and this estimator does not take it whole: its weights are off by as "
        "much. Use trust_region='segment' or bridge_exponent=1 without bridge_cap, or "
        f"{FRESHER}.",
    )


def _mismatch(metrics: Mapping[str, float]) -> Verdict | None:
    value = metrics.get("mismatch/abs_log_mean", 0.0)
    if _num_tokens(metrics, "0") < LEAST_TOKENS or value <= LARGEST_MISMATCH:
        return None
    return Verdict(
        "engine_mismatch",
        f"engine and trainer disagree on the tokens of lag 0 by {value:.3f} nats in the mean (most "
        f"{LARGEST_MISMATCH}), which is no staleness. Compare their dtype, temperature, tokenizer "
        "and weights; echo_every of WeightSyncCallback checks what was published. A quantized "
        "engine will differ: keep trust_region='segment' and segment_proximal='scored', a centre "
        "that the trainer computes.",
    )


def _rejected(metrics: Mapping[str, float]) -> Verdict | None:
    value = metrics.get("loss/rejected_fraction", 0.0)
    if value <= LARGEST_REJECTED:
        return None
    return Verdict(
        "many_rejected",
        f"{value:.0%} of the tokens are left out of the loss (most {LARGEST_REJECTED:.0%}). Raise "
        f"behavior_weight_cap or lower behavior_weight_floor, or {FRESHER}.",
    )


def _clipped(metrics: Mapping[str, float]) -> Verdict | None:
    value = metrics.get("loss/clip_fraction", 0.0)
    if value <= LARGEST_CLIPPED:
        return None
    return Verdict(
        "many_clipped",
        f"{value:.0%} of the ratios are clipped (most {LARGEST_CLIPPED:.0%}): these tokens teach "
        "nothing. Lower lr, num_epochs or num_minibatches, or raise clip_epsilon.",
    )


def _far_tokens(metrics: Mapping[str, float]) -> Verdict | None:
    value = metrics.get("drift/clamped_share", 0.0)
    if value <= 0:
        return None
    return Verdict(
        "clamped",
        f"{value:.2%} of the tokens are over 20 nats more or less likely to the trainer than to "
        "the engine. Look for sampling that the trainer does not know of (top_p, masks, another "
        "temperature) and for a policy that has collapsed.",
    )


def _of_lags(metrics: Mapping[str, float], name: str, *, first: int = 0) -> dict[str, float]:
    """The values of lags that have enough tokens."""
    return {
        lag: metrics[f"{name}_{lag}"]
        for lag in LAG_NAMES[first:]
        if f"{name}_{lag}" in metrics and _num_tokens(metrics, lag) >= LEAST_TOKENS
    }


def _num_tokens(metrics: Mapping[str, float], lag: str) -> float:
    return metrics.get(f"lag/tokens_{lag}", 0.0)


def _words(lag: str) -> str:
    return f"lag {lag.replace('plus', '+')}"
