"""The effective sample size of weights, and the learning rate that fits it.

Pure functions on log-weights, in nats; sums over micro-batches and ranks are exact.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sdp_lightning.objective.corrections import at_least_float32

LARGEST_LOG = 20.0  # nats; the square of what is above would drown every other weight


def weight_sums(
    log_weights: Tensor, loss_mask: Tensor, *, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """What is needed of one piece to know the effective sample size of all of them.

    Args:
        log_weights: [B, T] x - b; read only where the mask holds.
        loss_mask: [B, T] bool, a row is a sequence.
        level: one weight for every token, or for every row with tokens: the exp of their sum.

    Returns:
        [3] float64: sum of w, sum of w^2, number of weights. Sums of pieces add up. Log-weights are
        clamped to 20 nats either way.
    """
    logs = torch.where(loss_mask, at_least_float32(log_weights.detach()), 0.0).double()
    counted = loss_mask
    if level == "sequence":
        logs, counted = logs.sum(1), loss_mask.any(1)
    weights = logs.clamp(-LARGEST_LOG, LARGEST_LOG).exp() * counted
    return torch.stack([weights.sum(), (weights**2).sum(), counted.sum().double()])


def effective_share(sums: Tensor) -> float:
    r"""Effective sample size as a share of the sample: 1 for equal weights, 1/n for a single one.

    .. math:: \rho = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}

    Args:
        sums: [3] as :func:`weight_sums` gives them, added up.

    Returns:
        rho in (0, 1]; 1 without weights.
    """
    total, squares, count = map(float, sums.tolist())
    return min(1.0, total**2 / (count * squares)) if count else 1.0


def ess_scale(ess: float, *, reference: float = 1.0) -> float:
    r"""What the learning rate is multiplied with, for a step of such effective sample size.

    .. math:: \min(1, \sqrt{\rho / \rho_0})

    With adaptive optimizers the step that a noisy gradient allows goes with the square root of the
    sample size. Source: Huang et al. 2026 (VCPO), https://arxiv.org/abs/2602.17616.

    Args:
        ess: rho, as a share of the sample, of :func:`effective_share`.
        reference: rho_0, the share at which the learning rate is whole.

    Raises:
        ValueError: if one of them is not in (0, 1].
    """
    if not (0 < ess <= 1 and 0 < reference <= 1):
        raise ValueError(f"ess and reference must be in (0, 1], got {ess} and {reference}.")
    return min(1.0, math.sqrt(ess / reference))
