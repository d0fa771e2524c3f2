"""Advantages of trajectories over their siblings. Pure functions; B trajectories, G groups."""

from __future__ import annotations

import torch
from torch import Tensor

from sdp_lightning.config.update import StandardDeviation


def group_relative_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale_by_std: bool = True,
    std: StandardDeviation = "population",
    eps: float = 1e-6,
) -> Tensor:
    r"""Reward minus the mean of its group, over the standard deviation of the group.

    .. math:: A_i = (R_i - \bar R_g) / (\sigma_g + \epsilon), \quad
        \sigma_g^2 = \frac{1}{n} \sum_{j \in g} (R_j - \bar R_g)^2

    for a group g of G trajectories, with n = G for the deviation of a ``"population"``, and
    n = G - 1 for that of a ``"sample"``, which makes advantages smaller by sqrt((G - 1) / G). A
    group of one, or of equal rewards, gets exactly 0 under both.

    Sources: Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300; without the division: Liu et
    al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783.

    Args:
        rewards: [B].
        group_ids: [B] integers, in any order; equal ids are siblings.
        scale_by_std: divide by the standard deviation.
        std: the standard deviation that is meant.
        eps: added to the deviation.

    Returns:
        [B], float32, or float64 for float64 rewards.

    Raises:
        ValueError: if the two are not one-dimensional and of the same length.
    """
    group, size, deviation = _deviations(rewards, group_ids)
    if scale_by_std:
        square = deviation.new_zeros(size.numel()).index_add(0, group, deviation.square())
        count = size if std == "population" else (size - 1).clamp(min=1)
        scaled = deviation / ((square / count).sqrt() + eps)[group]
        deviation = torch.where(deviation == 0, 0.0, scaled)
    return deviation.to(torch.promote_types(rewards.dtype, torch.float32))


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    r"""Reward minus the mean of the others in its group (RLOO).

    .. math:: A_i = R_i - \frac{1}{G - 1} \sum_{j \ne i} R_j = \frac{G}{G - 1} (R_i - \bar R)

    A group of one, or of equal rewards, gets exactly 0. Source: Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740.

    Args:
        rewards: [B].
        group_ids: [B] integers, in any order; equal ids are siblings.

    Returns:
        [B], float32, or float64 for float64 rewards.

    Raises:
        ValueError: if the two are not one-dimensional and of the same length.
    """
    group, size, deviation = _deviations(rewards, group_ids)
    advantages = deviation * (size / (size - 1).clamp(min=1))[group]
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


def decoupled_sums(
    rewards: Tensor,
    weights: Tensor,
    group_ids: Tensor,
    *,
    std: StandardDeviation = "population",
    eps: float = 1e-6,
) -> Tensor:
    r"""Each reward normalized in its group, then their weighted sum (GDPO, before the batch).

    .. math:: S_i = \sum_k w_{ik} (R_{ik} - \bar R_{gk}) / (\sigma_{gk} + \epsilon)

    A group of one gets exactly 0, as does a reward that is equal in the whole group. Source: Liu et
    al. 2026, https://arxiv.org/abs/2601.05242.

    Args:
        rewards: [B, K] of K named rewards.
        weights: [B, K].
        group_ids: [B] integers, in any order; equal ids are siblings.
        std: the standard deviation that is meant.
        eps: added to each deviation.

    Returns:
        [B] float64.
    """
    columns = [
        group_relative_advantages(column, group_ids, std=std, eps=eps)
        for column in rewards.double().unbind(1)
    ]
    return (torch.stack(columns, 1) * weights).sum(1)


def batch_normalized(
    values: Tensor,
    *,
    count: float,
    total: float,
    squares: float,
    std: StandardDeviation = "population",
    eps: float = 1e-6,
) -> Tensor:
    r"""Values less the mean of a batch, over its standard deviation (the last step of GDPO).

    .. math:: A_i = (S_i - \bar S) / (\sigma_S + \epsilon)

    Args:
        values: [B] a part of the batch.
        count: number of the batch's values.
        total: their sum.
        squares: the sum of their squares.
        std: the standard deviation that is meant.
        eps: added to the deviation.

    Returns:
        [B] float32.
    """
    mean = total / count
    spread = max(squares - count * mean**2, 0.0)
    deviation = (spread / (count if std == "population" else max(count - 1, 1))) ** 0.5
    return ((values - mean) / (deviation + eps)).float()


def uniform_share(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Share of the groups whose rewards are all equal: their advantages are 0.

    Args:
        rewards: [B].
        group_ids: [B] integers, in any order; equal ids are siblings.

    Returns:
        [] float32.
    """
    group, size, deviation = _deviations(rewards, group_ids)
    spread = torch.zeros_like(size).index_add(0, group, deviation.abs())
    return (spread == 0).float().mean()


def group_std(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Mean over groups of the population's standard deviation of their rewards: the spread.

    Args:
        rewards: [B].
        group_ids: [B] integers, in any order; equal ids are siblings. A group of one counts as 0.

    Returns:
        [] float32.
    """
    group, size, deviation = _deviations(rewards, group_ids)
    square = torch.zeros_like(size).index_add(0, group, deviation.square())
    return (square / size).sqrt().float().mean()


def _deviations(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of each row's group [B], sizes [G], rewards less the group's mean [B] float64."""
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must both be [B], got {tuple(rewards.shape)} and "
            f"{tuple(group_ids.shape)}."
        )
    ids, group = torch.unique(group_ids, return_inverse=True)
    values = rewards.detach().double()
    zeros = values.new_zeros(ids.numel())
    size = zeros.index_add(0, group, torch.ones_like(values))
    deviation = values - (zeros.index_add(0, group, values) / size)[group]
    highest = zeros.scatter_reduce(0, group, values, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    return group, size, torch.where((highest == lowest)[group], 0.0, deviation)
