r"""KL divergence from a reference policy. Pure functions; B trajectories, T tokens, nats.

Estimates of KL(n || ref) from a sampled token, with d = ref - n:

.. math:: k_1 = -d, \quad k_2 = d^2 / 2, \quad k_3 = e^{d} - 1 - d, \quad e^{n - b} k_3

k1 and k3 have the KL as their mean over tokens of n, k2 nearly. Tokens here were sampled by the
behavior policy b; the first three are not weighted for that, as is usual, and the fourth,
``"weighted_k3"``, is. Sources: Schulman 2020, http://joschu.net/blog/kl-approx.html; weighted:
DeepSeek-V3.2, https://arxiv.org/abs/2512.02556.

k2, k3 and the weight are bounded at :data:`LARGEST_LOG_RATIO`, or one token that the policy has all
but given up would outweigh all others: k3 has a gradient of e^12 at d = 12, and an infinite one at
89. A reference that gives a token no probability counts as :data:`LEAST_LOGPROB`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sdp_lightning.objective.precision import at_least_float32

KLEstimator = Literal["k1", "k2", "k3", "weighted_k3"]
LARGEST_LOG_RATIO = 6.0  # nats; n samples a token with a larger ref - n at most once in e^6 = 403

LEAST_LOGPROB = math.log(torch.finfo(torch.float32).tiny)  # -87.3 nats: below it, float32 has none


def kl_estimate(
    target: Tensor,
    reference: Tensor,
    loss_mask: Tensor,
    estimator: KLEstimator,
    *,
    behavior: Tensor | None = None,
) -> Tensor:
    r"""Estimates of KL(n || ref), one per token.

    As a term of a loss, k2 has the gradient of the KL in the mean over tokens of n; k3 has that of
    the reverse one, KL(ref || n); k1 has none in the mean. The weighted k3 has the gradient of the
    KL in the mean over tokens of b:

    .. math:: \nabla\, e^{n - b} k_3 = e^{n - b} (n - ref) \nabla n

    k3 goes on as its tangent above d = 6, with the slope 1 - e^6, so that a token that is far too
    rare is still pulled up, and k2 beyond d = 6 and d = -6, with a slope of 6. The weight e^(n - b)
    is at most e^6, and the sign of the gradient stays that of n - ref. Below these bounds all are
    exact.

    Args:
        target: [B, T] n. May carry a gradient.
        reference: [B, T] log-probs under the reference, detached here; may be -inf.
        loss_mask: [B, T] bool. Values where it is False have no effect.
        estimator: name of the estimator.
        behavior: [B, T] b, detached here; read only for ``"weighted_k3"``, which requires it.

    Returns:
        [B, T], 0 outside the mask, at least float32.

    Raises:
        ValueError: if ``"weighted_k3"`` has no ``behavior``.
    """
    target, reference = at_least_float32(target), at_least_float32(reference.detach())
    distance = torch.where(loss_mask, reference.clamp(min=LEAST_LOGPROB) - target, 0.0)
    if estimator == "k1":
        return kl_of_log_ratio(distance, "k1")
    if estimator == "k2":
        return _bounded(distance, "k2", least=-LARGEST_LOG_RATIO, slope=LARGEST_LOG_RATIO)
    k3 = _bounded(distance, "k3", least=-math.inf, slope=math.expm1(LARGEST_LOG_RATIO))
    if estimator == "k3":
        return k3
    if behavior is None:
        raise ValueError("estimator='weighted_k3' weighs tokens by exp(n - b): pass behavior=.")
    log_weight = torch.where(loss_mask, target.detach() - behavior.detach(), 0.0)
    weight = log_weight.clamp(max=LARGEST_LOG_RATIO).exp()
    # n - ref is the gradient of k2: that of the weight and that of k3 add up to it.
    k2 = kl_of_log_ratio(distance, "k2")
    return weight * (k3.detach() + (k2 - k2.detach()))


def _bounded(
    distance: Tensor, estimator: Literal["k2", "k3"], *, least: float, slope: float
) -> Tensor:
    """The estimate, which goes on as its tangent outside of ``least`` to ``LARGEST_LOG_RATIO``."""
    inside = distance.clamp(least, LARGEST_LOG_RATIO)
    return kl_of_log_ratio(inside, estimator) + slope * (distance - inside).abs()


def kl_of_log_ratio(log_ratio: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates of KL(p || q), [...], from log q - log p of tokens sampled from p, [...] nats.

    Without a bound: e^89 overflows float32.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.expm1() - log_ratio


def kl_penalised_rewards(
    rewards: Tensor,
    behavior: Tensor,
    reference: Tensor,
    loss_mask: Tensor,
    *,
    coefficient: float,
    estimator: KLEstimator,
) -> Tensor:
    """Rewards less the KL of the policy that sampled, summed over the tokens of each trajectory.

    Args:
        rewards: [B].
        behavior: [B, T] b, under the policy that sampled.
        reference: [B, T] log-probs under the reference.
        loss_mask: [B, T] bool.
        coefficient: factor of the KL.
        estimator: name of the estimator.

    Returns:
        [B], detached.
    """
    kl = kl_estimate(behavior.detach(), reference, loss_mask, estimator)
    return rewards - coefficient * kl.sum(-1).to(rewards)
