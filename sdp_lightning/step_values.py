"""What a training step logs of its own, and a watch for rewards that teach nothing.

Shapes: B trajectories, T tokens, G groups.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sdp_lightning.batch import Batch
from sdp_lightning.errors import SDPError

logger = logging.getLogger(__name__)

WARN_AFTER = 10  # batches
REMEDY = (
    "Siblings with equal rewards teach nothing: give partial credit, sample more a prompt, or use "
    "rows that the model gets right sometimes. If it gets all of them right, it is done."
)


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


class UniformWatch:
    """Ends a run in which, batch after batch, no group has two different rewards.

    Args:
        limit: batches in a row; None never ends it. Ten in a row are warned of, once.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._in_a_row, self._warned = limit, 0, False

    def note(self, share: float, *, reward: float, rank: int = 0) -> None:
        """A batch of which this share of groups was uniform, and its mean reward.

        All ranks note the same; the first one warns.

        Raises:
            SDPError: if it is the last of ``limit`` in a row.
        """
        self._in_a_row = self._in_a_row + 1 if share >= 1 else 0
        text = (
            f"in {self._in_a_row} batches in a row all samples of every prompt had the same reward "
            f"(mean {reward:g}). {REMEDY}"
        )
        if self._limit is not None and self._in_a_row >= self._limit:
            raise SDPError(f"{text} max_uniform_in_a_row={self._limit} ends the run here.")
        if self._in_a_row == WARN_AFTER and not self._warned and rank == 0:
            self._warned = True
            logger.warning("%s", text)
