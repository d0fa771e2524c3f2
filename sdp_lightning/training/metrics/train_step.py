"""Values that a training step logs beside the statistics by lag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdp_lightning.objective.advantages import group_std, uniform_share
from sdp_lightning.training.batch import NO_VERSION, Batch, one_row_a_sample
from sdp_lightning.training.metrics.names import NAMED_REWARD


def step_values(
    batch: Batch, steps: Sequence[dict[str, Tensor]], num_ranks: int, *, apart: bool = False
) -> dict[str, tuple[Tensor, float]]:
    """Values by logged name, each [], with the weight that each has in the mean over ranks.

    Args:
        batch: the batch of this rank; rows without a token to train on are masked.
        steps: values of each of its optimizer steps, by name.
        num_ranks: number of ranks, with which counts are multiplied.
        apart: whether each of several rewards teaches on its own: a group is uniform if each is.
    """
    means = {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
    rows = 0 if batch.is_blank else len(batch)
    groups = 0 if batch.is_blank else int(batch.group_ids.unique().numel())
    whole, _ = one_row_a_sample(batch)
    samples = 0 if batch.is_blank else len(whole)
    masked = ~batch.loss_mask.any(1) & (not batch.is_blank)
    lengths = (batch.versions != NO_VERSION).sum(1)  # of masked rows, too
    return {
        "train/reward": (whole.rewards.mean(), samples),
        "train/reward_std": (group_std(whole.rewards, whole.group_ids), groups),
        **{name: (mean, samples) for name, mean in _named_means(whole).items()},
        **{f"train/{name}": (value, 1) for name, value in means.items()},
        "train/tokens": (batch.loss_mask.sum() * num_ranks, 1),
        "train/length": (lengths.float().mean(), rows),
        "train/truncated": (batch.truncated.float().mean(), rows),
        "train/masked_truncated": (masked.sum() * num_ranks, 1),
        "train/uniform": (uniform_share(_signals(whole, apart), whole.group_ids), groups),
    }


def _signals(batch: Batch, apart: bool) -> Tensor:
    """[B] numbers that differ where there is something to learn from."""
    if not apart or batch.named_rewards is None or batch.reward_weights is None:
        return batch.rewards
    weighted = batch.named_rewards * (batch.reward_weights != 0)
    return torch.unique(weighted, dim=0, return_inverse=True)[1]


def _named_means(batch: Batch) -> dict[str, Tensor]:
    if batch.named_rewards is None:
        return {}
    means = batch.named_rewards.mean(0)
    return {f"{NAMED_REWARD}{n}": mean for n, mean in zip(batch.reward_names, means, strict=True)}
