"""Ranks that Lightning has started on this machine, when they all stop by agreement."""

from __future__ import annotations

import atexit
import subprocess
import time
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.strategies.launchers import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,  # pyright: ignore[reportPrivateUsage]
)

END_S = 30.0  # for the others to end in order


def outlive_other_ranks(trainer: L.Trainer, *, end_s: float = END_S) -> None:
    """Let the ranks that this process has started end by themselves, and end after them.

    They end with a status that says by which signal. Lightning's observer of children would take it
    for a failure and kill this process, even while it writes the checkpoint; after Ctrl-C Lightning
    would kill them. A rank that still runs after ``end_s`` is killed.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, SubprocessScriptLauncher) and launcher.procs:
        others = list(launcher.procs)
        launcher.procs.clear()  # the observer's list, too
        atexit.register(end_all, others, end_s)


def end_all(processes: Sequence[subprocess.Popen[bytes]], end_s: float) -> None:
    """Wait until ``processes`` have ended, and kill those that still run after ``end_s``."""
    deadline = time.monotonic() + end_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
