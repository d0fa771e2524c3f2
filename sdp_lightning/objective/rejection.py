"""Rejection of tokens: drift or weight outside its bounds, the behavior mask, and M2PO.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal. Masked values must be replaced before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective.aggregation import sequence_mean, sequence_sum
from sdp_lightning.objective.precision import at_least_float32


def second_moment_set(log_drift: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """Tokens that M2PO constrains: those that have moved in the direction of their advantage.

    The others move back when they are trained, and no trust region holds them. The official code
    of M2PO takes the same: A > 0 with a ratio above 1, or A < 0 with one below.

    Args:
        log_drift: [...] x - b.
        advantages: [...].
        loss_mask: [...] bool.

    Returns:
        [...] bool.
    """
    return loss_mask & (torch.sign(log_drift) * torch.sign(advantages) > 0)


def second_moment_bound(log_drift: Tensor, cap: float) -> Tensor:
    r"""The largest |log drift| that M2PO keeps.

    .. math:: \max \{\delta : \mathrm{mean}(d_i^2 : |d_i| \le \delta) \le \text{cap}\}

    over the delta among |d_i|, so that equal drifts stay or go together. Source: Zheng et al. 2025
    (M2PO), https://arxiv.org/abs/2510.01161.

    Args:
        log_drift: [N] x - b of the tokens of :func:`second_moment_set` in the whole optimizer step,
            of all ranks.
        cap: largest second moment, positive.

    Returns:
        [] the bound, inclusive: 0 if no token fits, inf if there is none to bound.
    """
    if log_drift.numel() == 0:
        return at_least_float32(log_drift.new_full((), math.inf))
    distance = at_least_float32(log_drift.detach()).abs().sort().values
    # Means of ever more of a sorted list grow, so what fits is a prefix.
    count = torch.arange(1, distance.numel() + 1, device=distance.device)
    mean = distance.double().square().cumsum(0) / count
    last_of_equals = torch.ones_like(distance, dtype=torch.bool)
    last_of_equals[:-1] = distance[1:] > distance[:-1]
    return torch.where(last_of_equals & (mean <= cap), distance, 0.0).max()


def within_second_moment(
    log_drift: Tensor, advantages: Tensor, loss_mask: Tensor, bound: Tensor
) -> Tensor:
    """Tokens of ``loss_mask`` within the bound of :func:`second_moment_bound`. [...] bool."""
    beyond = second_moment_set(log_drift, advantages, loss_mask) & (log_drift.abs() > bound)
    return loss_mask & ~beyond


def correct(
    log_drift: Tensor, log_weight: Tensor, advantages: Tensor, loss_mask: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""Mask tokens outside cap and floor, or clamp their weight; mask those that left the region.

    .. math:: K = \{t : \text{floor} \le e^{d_t} \le \text{cap}\} \quad\text{or}\quad
        w \leftarrow \min(\max(w, \text{floor}), \text{cap})

    d is the log of drift or weight; for a sequence its sum, or its mean for the geometric mean,
    and the whole row stays or goes. Sources: truncation: Yao et al. 2025 (TIS),
    https://fengyao.notion.site/off-policy-rl; two-sided masks: Ling Team 2025 (IcePop),
    https://arxiv.org/abs/2510.18855; sequences: Liu et al. 2025 (MIS),
    https://yingru.notion.site/When-Speed-Kills-Stability-271211a558b7808d8b12d403fd15edda.

    Args:
        log_drift: [B, T] x - b.
        log_weight: [B, T].
        advantages: [B, T].
        loss_mask: [B, T] bool.
        config: cap, floor, what they test and what they do, and the behavior mask.

    Returns:
        (kept [B, T] bool, log_weight [B, T]).
    """
    kept = loss_mask
    if config.correction == "truncate":
        log_weight = clamped_to_bounds(log_weight, config)
    else:
        tested = log_drift if config.rejection_on == "drift" else log_weight
        if config.rejection_level == "sequence":
            tested = sequence_sum(tested, loss_mask)
        elif config.rejection_level == "geometric":
            tested = sequence_mean(tested, loss_mask)
        kept = loss_mask & within_bounds(tested, config)
    if config.behavior_mask:
        above, below = outside_region(log_drift, advantages, config)
        kept = kept & ~(above | below)
    return kept, log_weight


def outside_region(
    log_ratio: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Tokens whose ratio has left [1 - eps, 1 + eps_high] in the direction of the advantage.

    Returns:
        (above, below), each [...] bool: A > 0 and above the range, A < 0 and below it.
    """
    above = (advantages > 0) & (log_ratio > math.log1p(config.upper_epsilon))
    below = (advantages < 0) & (log_ratio < math.log1p(-config.clip_epsilon))
    return above, below


def within_bounds(log_value: Tensor, config: LossConfig) -> Tensor:
    """Whether floor <= exp(log_value) <= cap of the behavior weight. [...] bool."""
    floor, cap = config.behavior_weight_floor, config.behavior_weight_cap
    kept = torch.ones_like(log_value, dtype=torch.bool)
    if cap is not None:
        kept &= log_value <= math.log(cap)
    if floor is not None:
        kept &= log_value >= math.log(floor)
    return kept


def clamped_to_bounds(log_value: Tensor, config: LossConfig) -> Tensor:
    """``log_value`` clamped between the logs of floor and cap. [...]."""
    floor, cap = config.behavior_weight_floor, config.behavior_weight_cap
    if cap is not None:
        log_value = log_value.clamp(max=math.log(cap))
    if floor is not None:
        log_value = log_value.clamp(min=math.log(floor))
    return log_value
