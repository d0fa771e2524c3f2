"""The warning, once a run, that many groups went stale: training is biased by what they had."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

WARNING_SHARE = 0.05
WARNING_GROUPS = 50


class DropWarning:
    """Says once that too large a share of the groups was dropped, and what to change."""

    def __init__(self) -> None:
        self._warned = False

    def see(self, dropped: int, trained: int, num_aside: int) -> None:
        """Judge the counts so far.

        Args:
            dropped: groups of all ranks that were dropped.
            trained: groups of all ranks that were trained on.
            num_aside: groups of this rank, dropped while only their reward or environment ran.
        """
        total = dropped + trained
        if self._warned or total < WARNING_GROUPS or dropped <= WARNING_SHARE * total:
            return
        self._warned = True
        aside = f", {num_aside} of them while their reward or environment ran" if num_aside else ""
        remedy = "Raise max_head_lag, lower max_concurrent, or use on_overdue='wait'."
        if 2 * num_aside > dropped:
            remedy = "Make the reward or environment faster, or lower reward_timeout_s."
        logger.warning(
            "%d of %d finished or overdue groups went stale and were dropped%s: training is biased "
            "against long rollouts. %s",
            *(dropped, total, aside, remedy),
        )
