"""The folders of agents that are a command line: with the row, their output, and what they leave.

A folder has ``output.log``, and ``work``, where the agent works and finds ``row.json``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from sdp_lightning.rewards.timeouts import call_with_timeout
from sdp_lightning.types import Row
from sdp_lightning.workflows.agent.command import CommandAgent

logger = logging.getLogger(__name__)

FILES_S = 60.0  # to make or remove a folder, or read a file in it
_TAIL_BYTES, _TAIL_LINES = 2**13, 20
_MOST_REWARD = 2**16  # bytes of a file with a reward


class SampleFolders:
    """Makes the folder of each sample; keeps those of the last ones, and of the last that failed.

    Args:
        agent: says where, and how many.
    """

    def __init__(self, agent: CommandAgent) -> None:
        self._agent = agent
        self._base: str | None = None
        self._lock = threading.Lock()
        self._kept: dict[bool, deque[Path]] = {True: deque(), False: deque()}

    def make(self, row: Row) -> Path:
        """A new folder of a sample, with its row."""
        folder = Path(tempfile.mkdtemp(prefix="sample-", dir=self._make_base())).absolute()
        (folder / "work").mkdir()
        (folder / "work" / "row.json").write_text(self._agent.row_text(row))
        return folder

    def _make_base(self) -> str:
        with self._lock:
            if self._base is None:
                base = self._agent.folder
                self._base = tempfile.mkdtemp(prefix="sdp-agents-") if base is None else base
                os.makedirs(self._base, exist_ok=True)
                logger.info(
                    "agents run in folders of their own in %s. Those of the last %d samples, and "
                    "of the last %d that failed, are kept, each with output.log.",
                    *(self._base, self._agent.keep, self._agent.keep),
                )
            return self._base

    def keep(self, folder: Path, *, is_failed: bool) -> None:
        """Keep the folder of a sample that has ended."""
        self._kept[is_failed].append(folder)

    async def remove_old(self) -> None:
        """Remove the folders that are kept no more."""
        old = [
            kept.popleft()
            for kept in self._kept.values()
            for _ in range(len(kept) - self._agent.keep)
        ]
        if old:
            await call_with_timeout(_remove, old, timeout_s=FILES_S, what="removing old folders")


def read_reward(path: Path) -> Any:
    """JSON of a file that an agent wrote, which may be no plain file at all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no file")
        data = os.read(descriptor, _MOST_REWARD + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MOST_REWARD:
        raise ValueError(f"it has more than {_MOST_REWARD} bytes")
    return json.loads(data)


def end_of(path: Path) -> str:
    """The last lines of an output, for a message."""
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()[start > 0 :]  # whole ones
    except OSError as error:
        return f"(it cannot be read: {error})"
    return "\n".join(lines[-_TAIL_LINES:])


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            _say_unremovable(folder)


@functools.lru_cache(maxsize=1)
def _say_unremovable(folder: Path) -> None:
    logger.warning("the folder of an agent cannot be removed, and is left: %s", folder)
