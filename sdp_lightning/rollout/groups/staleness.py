"""Which finished groups are too old to train on.

The head lag is the policy version minus the version of the oldest sampled token of any member; the
tail lag is that of the newest token. Both versions are kept per group, so a decision is O(1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from sdp_lightning.config import MissingProximal
from sdp_lightning.errors import ConfigError, RolloutError, VersionError
from sdp_lightning.types import TrajectoryGroup


class StalenessControlStrategy(ABC):
    """Decides whether a group is stale at a policy version."""

    @abstractmethod
    def is_stale(self, group: TrajectoryGroup, version: int) -> bool:
        """Whether ``group`` must not be trained on at ``version``.

        Raises:
            VersionError: if the group holds a token of a later version.
            RolloutError: if it holds no sampled token at all.
        """

    @abstractmethod
    def overdue_from(self, head_version: int, tail_version: int) -> int | None:
        """First version at which a group with these versions is overdue; None if it never is.

        It rises with both versions.
        """

    @abstractmethod
    def stale_from(self, group: TrajectoryGroup, version: int) -> int | None:
        """First version at which a finished group may be stale that is not at ``version``."""

    def is_overdue(self, head_version: int, tail_version: int, version: int) -> bool:
        """Whether a group that still runs, with these versions so far, is stale at ``version``."""
        first = self.overdue_from(head_version, tail_version)
        return first is not None and version >= first


class StandardPPOStrategy(StalenessControlStrategy):
    """Never stale: standard decoupled PPO bounds submission only."""

    def is_stale(self, group: TrajectoryGroup, version: int) -> bool:
        versions_of(group, version)
        return False

    def overdue_from(self, head_version: int, tail_version: int) -> int | None:
        return None

    def stale_from(self, group: TrajectoryGroup, version: int) -> int | None:
        return None


class SegmentWisePPOStrategy(StalenessControlStrategy):
    """Stale when the head lag of any member is above ``max_head_lag``.

    Args:
        max_head_lag: 0 keeps lag 0 only: exactly on-policy.
        missing_proximal: with ``"drop"`` a group is stale, too, when one of its segments is 2 or
            more versions old and was never scored: the window for its proximal has passed.
        mask_overdue: judge by the tail lag: tokens beyond the bound are masked by the loss, and the
            group is stale only when no token is within it.
    """

    def __init__(
        self,
        *,
        max_head_lag: int,
        missing_proximal: MissingProximal = "behavior",
        mask_overdue: bool = False,
    ) -> None:
        if max_head_lag < 0:
            raise ConfigError(f"max_head_lag must be 0 or more, got {max_head_lag}.")
        self.max_head_lag = max_head_lag
        self.missing_proximal = missing_proximal
        self.mask_overdue = mask_overdue

    def is_stale(self, group: TrajectoryGroup, version: int) -> bool:
        head, tail = versions_of(group, version)
        if self.is_overdue(head, tail, version):
            return True
        if self.missing_proximal != "drop" or version - head < 2:
            return False
        return any(
            version - segment.version >= 2 and not segment.proximal.is_set
            for segment in group.segments
        )

    def overdue_from(self, head_version: int, tail_version: int) -> int:
        oldest = tail_version if self.mask_overdue else head_version
        return oldest + self.max_head_lag + 1

    def stale_from(self, group: TrajectoryGroup, version: int) -> int:
        first = self.overdue_from(*versions_of(group, version))
        if self.missing_proximal != "drop":
            return first
        closing = [s.version + 2 for s in group.segments if not s.proximal.is_set]
        return min([first, *closing])


def versions_of(group: TrajectoryGroup, version: int) -> tuple[int, int]:
    """Head and tail version of a group. The errors are those of ``is_stale``, naming the group."""
    head, tail = group.head_version, group.tail_version
    if head is None or tail is None:
        raise RolloutError(f"group {group.order} of row {group.row_id!r} has no sampled tokens.")
    if tail > version:
        raise VersionError(
            f"group {group.order} of row {group.row_id!r} holds a token of version {tail}, "
            f"but the policy is at version {version}."
        )
    return head, tail
