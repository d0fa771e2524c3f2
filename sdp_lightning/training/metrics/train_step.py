"""Values that a training step logs beside the statistics by lag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdp_lightning.objective.advantages import uniform_share
from sdp_lightning.training.batch import Batch


def step_values(
    batch: Batch, steps: Sequence[dict[str, Tensor]], num_ranks: int
) -> dict[str, tuple[Tensor, float]]:
    """Values by logged name, each [], with the weight that each has in the mean over ranks.

    Args:
        batch: the batch of this rank.
        steps: values of each of its optimizer steps, by name.
        num_ranks: number of ranks, with which counts are multiplied.
    """
    means = {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
    rows = 0 if batch.is_blank else len(batch)
    groups = 0 if batch.is_blank else int(batch.group_ids.unique().numel())
    return {
        "train/reward": (batch.rewards.mean(), rows),
        **{f"train/{name}": (value, 1) for name, value in means.items()},
        "train/tokens": (batch.loss_mask.sum() * num_ranks, 1),
        "train/truncated": (batch.truncated.float().mean(), rows),
        "train/uniform": (uniform_share(batch.rewards, batch.group_ids), groups),
    }
