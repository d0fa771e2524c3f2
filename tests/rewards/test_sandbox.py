"""Workers under bubblewrap and nsjail: what they may do, and tools that are missing or broken."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.cli.doctor import machine
from sdp_lightning.errors import ConfigError
from sdp_lightning.rewards import RewardCounts, RewardPool, WorkerLimits
from sdp_lightning.rewards.sandbox import SANDBOXES, in_sandbox, why_unusable
from support import probing_rewards
from support.reward_pools import DEADLINE_S, call

FILE = probing_rewards.__file__
PLACE = f"{FILE}:reward"

linux = pytest.mark.skipif(sys.platform != "linux", reason="the tools are of Linux")
# Stands in for a tool: writes its command line down, and runs the command after --.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$(dirname "$0")/{name}.line"
while [ "$1" != "--" ]; do shift; done
shift
exec "$@"
"""
REFUSING = """#!/bin/sh
echo "{name}: No permissions to create new namespace" >&2
exit 1
"""


def install(folder: Path, name: str, text: str, patch: pytest.MonkeyPatch) -> None:
    file = folder / name
    file.write_text(text.format(name=name))
    file.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@linux
@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_tool_that_is_missing_is_named_with_the_remedy(
    sandbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"sandbox='{sandbox}': {sandbox} is not inst"):
        RewardPool(PLACE, sandbox=sandbox)
    finding = machine.check_sandbox(sandbox)
    assert finding.state == "note" and "is not installed: install" in finding.text


@linux
@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_tool_that_does_not_work_here_is_tried_and_refused_with_its_own_words(
    sandbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, sandbox, REFUSING, monkeypatch)
    with pytest.raises(ConfigError, match=r"status 1: \w+: No permissions to .*user namespaces"):
        RewardPool(PLACE, sandbox=sandbox)
    finding = machine.check_sandbox(sandbox)
    assert finding.state == "note" and "No permissions" in finding.text


def test_another_tool_is_refused() -> None:
    settings: dict[str, Any] = {"sandbox": "docker"}
    with pytest.raises(ConfigError, match="sandbox must be bwrap, nsjail or None; got 'docker'"):
        RewardPool(PLACE, **settings)


@linux
@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_worker_is_started_by_the_command_line_of_its_tool(
    sandbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the tool: what it is told, and that a worker serves behind it."""
    install(tmp_path, sandbox, STAND_IN, monkeypatch)
    assert machine.check_sandbox(sandbox).state == "ok"
    with closing(RewardPool(PLACE, on_kill="zero", num_workers=1, sandbox=sandbox)) as pool:
        assert [call(pool, "good"), call(pool, "leave"), call(pool, "good")] == [1.0, 0.0, 1.0]
        assert pool.counts == RewardCounts(value=2, crashed=1)
    line = (tmp_path / f"{sandbox}.line").read_text().splitlines()
    told, command = line[: line.index("--")], line[line.index("--") + 1 :]
    assert command[0] == sys.executable and command[-1] == "0", "no parent: it has no number there"
    if sandbox == "bwrap":
        assert {"--unshare-all", "--die-with-parent", "--new-session"} <= set(told)
        assert "--share-net" not in told
        assert told[told.index("--ro-bind") :][:3] == ["--ro-bind", "/", "/"]
        assert told[told.index("--cap-drop") + 1] == "ALL"
        assert {"/tmp", "/run"} <= {told[i + 1] for i, x in enumerate(told) if x == "--tmpfs"}
    else:
        assert told[told.index("--pass_fd") + 1] == command[-2]
        assert told[told.index("--time_limit") + 1] == "0"
        assert {"--disable_rlimits", "--keep_env"} <= set(told)
        assert not {"--disable_clone_newnet", "-N", "--rw"} & set(told)
        assert any(part.startswith("none:/tmp:tmpfs:") for part in told)


def test_files_that_a_worker_needs_stay_visible_also_below_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdp_lightning.rewards.sandbox._HIDDEN", (str(tmp_path),))
    needed, other = tmp_path / "task" / "reward.py", tmp_path / "other.py"
    needed.parent.mkdir()
    needed.touch()
    for sandbox in SANDBOXES:
        files = [str(needed), str(needed.parent), str(tmp_path), str(tmp_path / "missing.py")]
        line = in_sandbox(sandbox, ["true"], files=files)
        told = line[: line.index("--")]
        assert str(needed) in told and str(needed.parent) in told
        assert not {str(other), str(tmp_path), str(tmp_path / "missing.py")} & set(told)


# With the tool itself, where there is one ---------------------------------------------------------


@pytest.fixture(scope="module", params=SANDBOXES)
def confined(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[RewardPool]:
    if reason := why_unusable(request.param):
        pytest.skip(reason)
    limits = WorkerLimits(processes=20)
    settings: dict[str, Any] = {"sandbox": request.param, "limits": limits}
    with closing(
        RewardPool(PLACE, on_kill="zero", num_workers=1, timeout_s=DEADLINE_S, **settings)
    ) as pool:
        yield pool


@linux
def test_a_confined_worker_has_no_network_writes_no_file_and_sees_no_process(
    confined: RewardPool, tmp_path: Path
) -> None:
    assert call(confined, "good") == 1.0
    assert call(confined, "num_interfaces") <= 1.0, "the loopback device alone"
    for path in (tmp_path / "new", Path(FILE).parent / "new", Path.home() / "new", Path("/new")):
        assert call(confined, "may_write", file=str(path)) == 0.0
        assert not path.exists()
    (tmp_path / "mine").touch()
    assert call(confined, "may_read", file=str(tmp_path / "mine")) == 0.0, "/tmp is its own"
    assert call(confined, "may_write", file="/tmp/new") == 1.0
    assert not Path("/tmp/new").exists()
    assert call(confined, "num_processes") <= 6
    assert call(confined, "abort") == 0.0 and call(confined, "good") == 1.0


@linux
def test_nothing_of_a_confined_worker_is_left_after_a_hang(
    confined: RewardPool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"sandbox": confined.sandbox, "num_workers": 1, "timeout_s": 5.0}
    mark = f"sdp-{os.getpid()}-{tmp_path.name}"
    with closing(RewardPool(PLACE, on_kill="zero", **settings)) as pool:
        assert call(pool, "hang_as", name=mark) == 0.0
        assert pool.counts == RewardCounts(timed_out=1)
        assert call(pool, "good") == 1.0
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if mark.encode() in line]
