"""The recipe with a real vLLM server, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from support.paths import ROOT
from support.real_vllm import assert_gone, require_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(960)]

MARK = "SDP_TEST_MARK"  # servers inherit it, in whatever session they are
DEADLINE_S = 900.0


def marked_processes(mark: str) -> dict[int, str]:
    """Command lines of the processes that carry the mark in their environment."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is another user's
    return found


def test_the_script_trains_through_its_server_and_leaves_no_process(tmp_path: Path) -> None:
    mark, log = uuid.uuid4().hex, tmp_path / "output"
    script = [sys.executable, "-W", "error::UserWarning", "recipes/vllm_local/train.py"]
    with log.open("wb") as output:
        run = subprocess.Popen(
            [*script, "--steps", "2", "--python", require_vllm()],
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    seen: dict[int, str] = {}
    deadline = time.monotonic() + DEADLINE_S
    try:
        while run.poll() is None and time.monotonic() < deadline:
            seen |= marked_processes(mark)
            time.sleep(0.5)
    finally:
        run.kill()
        run.wait()
    text = log.read_text()
    assert run.returncode == 0, text[-3000:]
    steps = re.findall(r"^step (\d)/2  v\d  reward (\S+)", text, re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2"], text[-3000:]
    assert all(0 <= float(reward) <= 1 for _, reward in steps)
    [found] = re.findall(r": (\S+) before, (\S+) after 2 steps\.$", text, re.MULTILINE)
    assert all(0 < float(accuracy) < 1 for accuracy in found)
    assert any("vllm.entrypoints" in command for command in seen.values()), seen
    assert_gone(seen)
    assert not marked_processes(mark)
