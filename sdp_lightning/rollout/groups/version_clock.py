"""The version clock: the policy version that the trainer holds, and the one that engines sample."""

from __future__ import annotations

from sdp_lightning.engines.protocol import require_next_version
from sdp_lightning.errors import VersionError


class VersionClock:
    """The policy version: none until the first publish, then one more with each commit.

    ``served`` is the version that engines sample: the same, or the one before while a publish ends
    beside the trainer's step. It has no lock of its own: its owner's guards it.
    """

    def __init__(self) -> None:
        self._version: int | None = None
        self._is_served = True

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

    @property
    def served(self) -> int:
        """The version that engines sample. ``VersionError`` before the first publish."""
        return self.version if self._is_served else self.version - 1

    def set(self, version: int) -> None:
        """Start at any version, fresh or resumed."""
        self._version, self._is_served = version, True

    def require_next(self, version: int) -> None:
        """Raise ``VersionError`` unless ``version`` is the next one."""
        require_next_version(version, self._version, holder="the policy")

    def advance(self, version: int, *, served: bool = True) -> None:
        """Commit ``version``, which engines sample now or, without ``served``, after ``serve``.

        Raises:
            VersionError: if it is not the next one, or engines do not sample the present one yet.
        """
        self.require_next(version)
        if not self._is_served:
            raise VersionError(
                f"version {self.version} is not served yet; cannot commit {version}."
            )
        self._version, self._is_served = version, served

    def serve(self) -> None:
        """Note that engines sample the version that the trainer holds."""
        self._is_served = True
