"""What a training step logs of its own, and a watch for rewards that teach nothing.

Shapes: B trajectories, T tokens, G groups.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sdp_lightning.training.batch import Batch

logger = logging.getLogger(__name__)


def step_values(
    batch: Batch, steps: Sequence[dict[str, Tensor]], num_ranks: int
) -> dict[str, Tensor]:
    """By name, each []: to be averaged over ranks.

    Args:
        batch: of this rank.
        steps: what each optimizer step gave.
        num_ranks: for what is a sum over ranks.
    """
    means = {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
    return {
        "train/reward": batch.rewards.mean(),
        **{f"train/{name}": value for name, value in means.items()},
        "train/tokens": batch.loss_mask.sum() * num_ranks,
        "train/truncated": batch.truncated.float().mean(),
        "train/uniform": uniform_share(batch.rewards, batch.group_ids),
    }


def uniform_share(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[] share of the groups all of whose members have the same reward.

    Args:
        rewards: [B].
        group_ids: [B].
    """
    ids, group = torch.unique(group_ids, return_inverse=True)
    bounds = rewards.new_zeros(2, ids.numel())
    low = bounds[0].scatter_reduce(0, group, rewards, "amin", include_self=False)
    high = bounds[1].scatter_reduce(0, group, rewards, "amax", include_self=False)
    return (low == high).float().mean()
