"""From the policy that sampled a token to the policy around which it is trained.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal. What is masked out must be replaced before it comes here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig, MissingProximal


def complete_segment_logprobs(
    segment: Tensor,
    scored: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    lags: Tensor,
    missing: MissingProximal,
) -> Tensor:
    """Segment proximal log-probs q for every token, also those that nobody scored in time.

    A token of lag 1 takes x, because the policy after its own is the proximal policy of this step;
    so does one of lag 0, whose own policy it is. An older token that was scored keeps its score.

    Args:
        segment: [...] the scores; read only where ``scored`` and the lag is at least 2.
        scored: [...] bool.
        proximal: [...] x.
        behavior: [...] b.
        lags: [...] integers k, 0 where there is no token to train.
        missing: what stands in at k >= 2 without a score: ``"behavior"`` takes b, ``"decoupled"``
            takes x, ``"loglinear"`` takes b + (x - b) / k.

    Returns:
        [...] q, detached, at least float32.

    Raises:
        ValueError: for an unscored token of lag >= 2 under ``"drop"``: its group should have been
            dropped before it reached a batch.
    """
    segment, proximal, behavior = (
        at_least_float32(t.detach()) for t in (segment, proximal, behavior)
    )
    old = lags >= 2
    if missing == "drop":
        count = int((old & ~scored).sum())
        if count:
            raise ValueError(
                f"{count} tokens of lag 2 or more have no segment proximal: under "
                "missing_proximal='drop' their groups must be dropped before they are collated."
            )
        substitute = proximal
    elif missing == "behavior":
        substitute = behavior
    elif missing == "decoupled":
        substitute = proximal
    else:
        substitute = behavior + (proximal - behavior) / lags.clamp(min=1)
    return torch.where(old, torch.where(scored, segment, substitute), proximal)


def centre_and_log_weight(
    proximal: Tensor, segment: Tensor, behavior: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""Centre m of the trust region, and log w, the correction from behavior to centre.

    .. math:: \log w = (q - b) + \lambda \min(\log C, x - q) \quad\text{for a proximal centre}

    and m - b otherwise. q is read only if the estimator needs it.

    Args:
        proximal: [...] x.
        segment: [...] q.
        behavior: [...] b.
        config: trust region, bridge exponent and bridge cap.

    Returns:
        (m, log w), each [...].
    """
    if config.trust_region == "behavior":
        return behavior, torch.zeros_like(behavior)
    if config.trust_region == "segment":
        return segment, segment - behavior
    if not config.needs_segment_proximal:
        return proximal, proximal - behavior
    bridge = proximal - segment
    if config.bridge_cap is not None:
        bridge = bridge.clamp(max=math.log(config.bridge_cap))
    return proximal, (segment - behavior) + config.bridge_exponent * bridge


def within_bounds(log_value: Tensor, config: LossConfig) -> Tensor:
    """Whether floor <= exp(log_value) <= cap of the behavior weight. [...] bool."""
    floor, cap = config.behavior_weight_floor, config.behavior_weight_cap
    kept = torch.ones_like(log_value, dtype=torch.bool)
    if cap is not None:
        kept &= log_value <= math.log(cap)
    if floor is not None:
        kept &= log_value >= math.log(floor)
    return kept


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers; halves become float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
