"""What a reward worker and the processes that it starts may take of the machine.

Worker processes import this, so it imports next to nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sdp_lightning.config.validation import check_types
from sdp_lightning.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class WorkerLimits:
    """Limits of each worker of a :class:`RewardPool`; None is no limit.

    ``memory_mb``, ``open_files`` and ``file_mb`` are resource limits of the operating system, which
    hold for each process; beyond them the reward's own call fails. ``processes`` is counted by the
    worker's keeper ten times a second, and ends a worker that has more: ``RLIMIT_NPROC`` would
    count all threads of the user on this machine, and does not bind root.

    Attributes:
        memory_mb: data memory of a process in MiB (2**20 bytes), with the imports of the reward.
        processes: processes that a worker runs at once, with the one that runs the call.
        open_files: files that a process has open at once.
        file_mb: size in MiB of a file that a process writes.

    Raises:
        ConfigError: if a limit is out of range.
    """

    memory_mb: float | None = 4096
    processes: int | None = 256
    open_files: int | None = 4096
    file_mb: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in vars(self).items():
            if value is not None and not 0 < value < 2**40:
                raise ConfigError(f"{name} must be above 0 and below 2**40, or None; got {value}.")

    @property
    def memory_bytes(self) -> int | None:
        """``memory_mb`` in bytes."""
        return None if self.memory_mb is None else int(self.memory_mb * MIB)

    def enforce(self) -> None:
        """Limit this process and those that it starts, which write no core files either."""
        import resource

        # Data and not address space: libraries reserve more addresses than they ever use.
        files = None if self.file_mb is None else int(self.file_mb * MIB)
        for kind, limit in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_DATA, self.memory_bytes),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_FSIZE, files),
        ):
            if limit is not None:
                _, hard = resource.getrlimit(kind)
                least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
                resource.setrlimit(kind, (least, least))

    def unenforced(self, platform: str = sys.platform) -> list[str]:
        """Sentences on the limits that this system does not enforce."""
        notes: list[str] = []
        if platform == "darwin" and self.memory_mb is not None:
            notes.append(f"macOS does not enforce limits.memory_mb={self.memory_mb:g}.")
        if platform != "linux" and self.processes is not None:
            notes.append(f"limits.processes={self.processes} is enforced on Linux only.")
        return notes
