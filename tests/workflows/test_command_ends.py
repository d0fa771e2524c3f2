"""All that an agent's command started ends with its sample, and with the trainer."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from sdp_lightning.workflows.agent.workflow import AgentWorkflow
from support import asking_agent
from support.agents import SayingEngine, roll_agent
from support.conversations import ROWS
from support.fork_server import ForkServer
from support.forked_processes import forked
from support.paths import ROOT
from support.rollouts import rolling, wait_until
from support.waiting import DEADLINE_S, wait_for

if sys.platform != "linux":
    pytest.skip("only Linux finds processes that called setsid", allow_module_level=True)


def workflow_that(*acts: str, folder: Path | str, **settings: Any) -> AgentWorkflow:
    words = [sys.executable, "-I", "-S", asking_agent.__file__, "{prompt}", *acts]
    agent = sdp.CommandAgent(words, folder=str(folder), reward_from="exit", grace_s=0.2)
    return AgentWorkflow(agent, group_size=1, **settings)


def running_below(folder: Path) -> list[str]:
    """Command lines of the processes that work below a folder."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended
    return found


def started(file: Path) -> Sequence[int]:
    """The agent, its guard, a child, one in a session of its own, and a stubborn orphan."""
    wait_for(file.exists)
    numbers: list[int] = json.loads(file.read_text())
    assert len(numbers) == 5 and all(Path(f"/proc/{number}").exists() for number in numbers)
    return numbers


def test_what_a_command_leaves_running_ends_before_its_reward(tmp_path: Path) -> None:
    def reward(row: Any, transcript: Any) -> float:
        numbers = json.loads((transcript.process.folder / "left").read_text())
        return float(not running_below(transcript.process.folder) and len(numbers) == 5)

    words = [sys.executable, "-I", "-S", asking_agent.__file__, "{prompt}", "ask=a", "leave=left"]
    agent = sdp.CommandAgent(words, folder=str(tmp_path), grace_s=0.2)
    [group] = roll_agent(agent, SayingEngine(lambda read: "yes"), reward=reward)
    assert [t.reward for t in group.trajectories] == [1.0, 1.0]


@pytest.mark.parametrize("how", ["close", "staleness"])
@pytest.mark.fault("hang", "teardown")
def test_a_run_that_closes_and_a_drop_by_staleness_end_all(how: str, tmp_path: Path) -> None:
    file = tmp_path / "left"
    workflow = workflow_that("ask=a", f"leave={file}", "hang", folder=tmp_path)
    settings: dict[str, Any] = {"rows": ROWS[:1], "batch_size": 1, "num_epochs": 1}
    settings |= {"max_head_lag": 0, "on_overdue": "drop"}
    with rolling(FakeEngine(3), workflow, **settings) as executor:
        numbers = started(file)
        if how == "staleness":
            executor.publish([], 1)
            wait_until(executor, lambda: executor.stat.dropped == 1)
            wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in numbers))
    assert not running_below(tmp_path)


@pytest.mark.fault("hang", "generate")
def test_a_command_that_runs_out_of_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    ended: list[Any] = []

    def reward(row: Any, transcript: Any) -> float:
        ended.append((transcript.ended_by, transcript.process.status, running_below(tmp_path)))
        return 0.5

    words = [sys.executable, "-I", "-S", asking_agent.__file__, "{prompt}", "ask=a", "hang"]
    agent = sdp.CommandAgent(words, folder=str(tmp_path), grace_s=0.2)
    engine = SayingEngine(lambda read: "yes")
    for timeout_s in (0.5, 4.0, 64.0):  # longer where the machine is busy
        group = roll_agent(agent, engine, reward=reward, timeout_s=timeout_s, group_size=1)
        assert not running_below(tmp_path)
        if group:
            break  # it was answered before
    assert ended == [("timeout_s", None, [])]


@pytest.mark.fault("process killed", "generate")
def test_an_agent_that_kills_its_guard_ends_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "left"
    workflow = workflow_that("ask=a", f"leave={file}", "unguard", "hang", folder=tmp_path)
    settings: dict[str, Any] = {"rows": ROWS[:1], "batch_size": 1, "num_epochs": 1}
    with rolling(FakeEngine(3), workflow, lost_retries=0, **settings) as executor:
        assert executor.take() is None
        assert list(executor.telemetry.errors) == ["the guard of an agent's process was killed"]
        numbers = json.loads(file.read_text())
        wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in numbers))
    assert not running_below(tmp_path)


TRAINER = """
import sys
sys.path[:0] = {paths!r}
from support.conversations import ROWS
from support.rollouts import FakeEngine, rolling
from workflows.test_command_ends import workflow_that

acts = ["ask=a", "leave={folder}/left", "hang"]
with rolling(FakeEngine(3), workflow_that(*acts, folder={folder!r}), rows=ROWS[:1]) as executor:
    executor.take()
"""


@pytest.mark.fault("process killed", "teardown")
def test_a_trainer_that_is_killed_or_interrupted_leaves_nothing(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    signals = {"killed": signal.SIGKILL, "interrupted": signal.SIGINT}
    paths = [str(ROOT), str(ROOT / "tests")]
    scripts = {how: TRAINER.format(paths=paths, folder=str(tmp_path / how)) for how in signals}
    for how in signals:
        (tmp_path / how).mkdir()
    with forked(fork_server, scripts, tmp_path) as forks:
        numbers = [
            *started(tmp_path / "killed" / "left"),
            *started(tmp_path / "interrupted" / "left"),
        ]
        for how, number in signals.items():
            os.kill(forks.running[how].pid, number)
        ended = forks.wait(DEADLINE_S)
        assert ended["killed"].returncode == -signal.SIGKILL
        assert ended["interrupted"].stderr.rstrip().endswith("KeyboardInterrupt")
        wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in numbers))
        wait_for(lambda: not running_below(tmp_path))
