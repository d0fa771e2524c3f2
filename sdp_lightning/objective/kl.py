r"""KL divergence from a reference policy. Pure functions; B trajectories, T tokens, nats.

Estimates of KL(n || ref) from a sampled token, with d = ref - n:

.. math:: k_1 = -d, \quad k_2 = d^2 / 2, \quad k_3 = e^{d} - 1 - d

k1 and k3 have the KL as their mean over tokens of n, k2 nearly. Tokens here were sampled by the
behavior policy, and are not weighted for that, as is usual. Source: Schulman 2020,
http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdp_lightning.objective.precision import at_least_float32

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    target: Tensor, reference: Tensor, loss_mask: Tensor, estimator: KLEstimator
) -> Tensor:
    """Estimates of KL(n || ref), one per token.

    As a term of a loss, k2 has the gradient of the KL in the mean over tokens of n; k3 has that of
    the reverse one, KL(ref || n); k1 has none in the mean.

    Args:
        target: [B, T] n. May carry a gradient.
        reference: [B, T] log-probs under the reference, detached here.
        loss_mask: [B, T] bool. Values where it is False have no effect.
        estimator: name of the estimator.

    Returns:
        [B, T], 0 outside the mask, at least float32.
    """
    target, reference = at_least_float32(target), at_least_float32(reference.detach())
    distance = torch.where(loss_mask, reference - target, 0.0)
    return kl_of_log_ratio(distance, estimator)


def kl_of_log_ratio(log_ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates of KL(p || q), [...], from log q - log p of tokens sampled from p, [...] nats."""
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
