"""Rank 0 ends after the ranks that it has started, which Lightning's observer would not allow."""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from sdp_lightning.lightning.launched_ranks import outlive_other_ranks

WAITS = "import signal; signal.pause()"


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-SEc", code])


@pytest.mark.parametrize("agreed", [True, False], ids=["agreed", "a failure"])
def test_lightnings_observer_kills_rank_0_only_if_nobody_agreed_to_stop(
    monkeypatch: pytest.MonkeyPatch, agreed: bool
) -> None:
    """The observer's look comes when another rank has ended by the signal, and rank 0 has not."""
    exits: list[Callable[[], Any]] = []
    monkeypatch.setattr(atexit, "register", lambda f, *args: exits.append(lambda: f(*args)))
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=3, num_nodes=1)
    main, ended, hangs = (
        child(WAITS),
        child("raise SystemExit(1)"),
        child(WAITS),
    )
    launcher.procs += [ended, hangs]
    observer = _ChildProcessObserver(main_pid=main.pid, child_processes=launcher.procs)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    try:
        if agreed:
            outlive_other_ranks(trainer, end_s=0.0)
        assert ended.wait(60.0) == 1
        assert observer._run(), "it is not asked again"
        launcher.kill(signal.SIGKILL)  # as Lightning does after Ctrl-C
        if agreed:
            assert main.poll() is None and hangs.poll() is None
            (at_exit,) = exits
            at_exit()
            assert hangs.returncode == -signal.SIGKILL, "it did not end in time"
        else:
            assert main.wait(60.0) == -signal.SIGKILL and not exits
    finally:
        for process in (main, ended, hangs):
            process.kill()
            process.wait()


def test_without_ranks_that_it_has_started_there_is_nothing_to_outlive() -> None:
    for launcher in (None, _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)):
        outlive_other_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))  # type: ignore
