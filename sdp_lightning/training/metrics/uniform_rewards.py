"""Watch for uniform rewards: all samples of every prompt have the same one."""

from __future__ import annotations

import logging

from sdp_lightning.errors import SDPError

logger = logging.getLogger(__name__)

WARN_AFTER = 10  # batches
REMEDY = (
    "Siblings with equal rewards give no learning signal: give partial credit, sample more a "
    "prompt, or use rows that the model solves sometimes. If it solves all of them, it is done."
)


class UniformWatch:
    """Ends a run in which no group of many batches in a row has two different rewards.

    It warns once, after ``WARN_AFTER`` batches.

    Args:
        limit: number of batches in a row that ends the run; None never does.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._in_a_row, self._warned = limit, 0, False

    def note(self, share: float, *, reward: float, rank: int = 0) -> None:
        """Count one batch. All ranks pass the same values; rank 0 warns.

        Args:
            share: share of its groups with uniform rewards.
            reward: mean reward of the batch.
            rank: rank of this process.

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
