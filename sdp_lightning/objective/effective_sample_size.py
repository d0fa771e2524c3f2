"""The effective sample size of weights, and the learning rate that fits it: pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_share(count: Tensor, weights: Tensor, squares: Tensor) -> Tensor:
    r"""Effective sample size as a share of the sample: 1 for equal weights, 1/n for a single one.

    .. math:: \rho = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}

    Args:
        count: [...] n.
        weights: [...] sum of w.
        squares: [...] sum of w^2.

    Returns:
        [...] rho in (0, 1], 0 without weights.
    """
    return torch.where(count > 0, weights**2 / (count * squares).clamp(min=1e-30), 0.0)


def ess_scale(ess: float, *, reference: float = 1.0) -> float:
    r"""Factor of the learning rate for a step with a given effective sample size.

    .. math:: \min(1, \sqrt{\rho / \rho_0})

    With adaptive optimizers the step that a noisy gradient allows goes with the square root of the
    sample size. Source: Huang et al. 2026 (VCPO), https://arxiv.org/abs/2602.17616, who take the
    weights of sequences; the losses here weigh tokens, and so do their weights.

    Args:
        ess: rho, a share of the sample; 0 means no sample.
        reference: rho_0, the share at which the learning rate is whole.

    Returns:
        A factor in (0, 1]; 1 without a sample, whose gradient is 0.

    Raises:
        ValueError: if ``ess`` is not in [0, 1] or ``reference`` not in (0, 1].
    """
    if not (0 <= ess <= 1 + 1e-9 and 0 < reference <= 1):
        raise ValueError(f"ess and reference must be in [0, 1], got {ess} and {reference}.")
    return min(1.0, math.sqrt(ess / reference)) if ess else 1.0
