"""From the policy that sampled a token to the policy around which it is trained.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal. What is masked out must be replaced before it comes here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig, MissingProximal
from sdp_lightning.objective.aggregation import sequence_mean, sequence_sum


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
        substitute = loglinear_segment(proximal, behavior, lags)
    return torch.where(old, torch.where(scored, segment, substitute), proximal)


def loglinear_proximal(target: Tensor, behavior: Tensor, lags: Tensor, share_done: float) -> Tensor:
    r"""Proximal log-probs x without a forward: on the straight way from b to n.

    .. math:: x \approx b + (n - b) \, k / (k + f)

    A token of lag k was sampled k versions before this step, and n is f steps into it. At k = 0 the
    proximal policy is the token's own: b, or n itself before the first update. Source: AReaL,
    https://arxiv.org/abs/2505.24298, whose code has it with f = 1.

    Args:
        target: [...] n; its gradient is not followed.
        behavior: [...] b.
        lags: [...] integers k, 0 or more.
        share_done: f in [0, 1): the share of this step's optimizer updates already made.

    Returns:
        [...] x, detached, at least float32. Exact at f = 0, and where log-probs move on a line.

    Raises:
        ValueError: if ``share_done`` is not in [0, 1).
    """
    if not 0 <= share_done < 1:
        raise ValueError(f"share_done must be in [0, 1), got {share_done}.")
    target, behavior = (at_least_float32(t.detach()) for t in (target, behavior))
    if share_done == 0:
        return target
    steps = lags.to(target)
    return torch.lerp(behavior, target, steps / (steps + share_done))


def loglinear_segment(proximal: Tensor, behavior: Tensor, lags: Tensor) -> Tensor:
    r"""Segment proximal log-probs q without a score: on the straight way from b to x.

    .. math:: q \approx b + (x - b) / k, \quad q = x \;\text{for}\; k \le 1

    With x of :func:`loglinear_proximal` this is b + (n - b) / (k + f).

    Args:
        proximal: [...] x.
        behavior: [...] b.
        lags: [...] integers k, 0 or more.

    Returns:
        [...] q, detached, at least float32.
    """
    proximal, behavior = (at_least_float32(t.detach()) for t in (proximal, behavior))
    return torch.lerp(behavior, proximal, 1 / lags.clamp(min=1).to(proximal))


def past_centre(segment: Tensor, behavior: Tensor, lags: Tensor) -> Tensor:
    """Centre of ``trust_region="past"``: q, but b at lag 1.

    There q is x, the policy in training: in the first update nothing would be clipped, however far
    a token has moved since it was sampled. The centre is thus older than x at every lag but 0.

    Args:
        segment: [...] q, completed.
        behavior: [...] b.
        lags: [...] integers, 0 or more.

    Returns:
        [...] detached, at least float32.
    """
    segment, behavior = (at_least_float32(t.detach()) for t in (segment, behavior))
    return torch.where(lags == 1, behavior, segment)


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
        cap: of the second moment, positive.

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
    """What is left of ``loss_mask`` under the bound of :func:`second_moment_bound`. [...] bool."""
    beyond = second_moment_set(log_drift, advantages, loss_mask) & (log_drift.abs() > bound)
    return loss_mask & ~beyond


def centre_and_log_weight(
    proximal: Tensor, segment: Tensor, behavior: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""Centre m of the trust region, and log w, the correction from behavior to centre.

    .. math:: \log w = (q - b) + \lambda \min(\log C, x - q) \quad\text{for a proximal centre}

    and m - b otherwise. q is read only if the estimator needs it.

    Args:
        proximal: [...] x.
        segment: [...] q; around ``"past"`` the :func:`past_centre`.
        behavior: [...] b.
        config: trust region, bridge exponent and bridge cap.

    Returns:
        (m, log w), each [...].
    """
    if config.trust_region == "behavior":
        return behavior, torch.zeros_like(behavior)
    if config.trust_region in ("segment", "past"):
        return segment, segment - behavior
    if not config.needs_segment_proximal:
        return proximal, proximal - behavior
    bridge = proximal - segment
    if config.bridge_cap is not None:
        bridge = bridge.clamp(max=math.log(config.bridge_cap))
    return proximal, (segment - behavior) + config.bridge_exponent * bridge


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
    """Where a ratio has left [1 - eps, 1 + eps_high] in the direction of its advantage.

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
    """log_value, brought between the logs of floor and cap. [...]."""
    floor, cap = config.behavior_weight_floor, config.behavior_weight_cap
    if cap is not None:
        log_value = log_value.clamp(max=math.log(cap))
    if floor is not None:
        log_value = log_value.clamp(min=math.log(floor))
    return log_value


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers; halves become float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
