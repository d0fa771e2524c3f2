"""The version clock: the policy version that the trainer holds."""

from __future__ import annotations

from sdp_lightning.engines.protocol import require_next_version
from sdp_lightning.errors import VersionError


class VersionClock:
    """The policy version: none until the first publish, then one more with each commit.

    It has no lock of its own: its owner's guards it.
    """

    def __init__(self) -> None:
        self._version: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether the first publish has happened."""
        return self._version is not None

    @property
    def version(self) -> int:
        """The policy version. ``VersionError`` before the first publish."""
        if self._version is None:
            raise VersionError("nothing was published yet: call publish(..., reset=True) first.")
        return self._version

    def set(self, version: int) -> None:
        """Start at any version, fresh or resumed."""
        self._version = version

    def require_next(self, version: int) -> None:
        """Raise ``VersionError`` unless ``version`` is the next one."""
        require_next_version(version, self._version, holder="the policy")

    def advance(self, version: int) -> None:
        """Commit ``version``. ``VersionError`` unless it is the next one."""
        self.require_next(version)
        self._version = version
