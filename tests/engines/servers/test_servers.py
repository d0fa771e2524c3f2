"""Managed servers never outlive the process that started them.

Real processes; the interpreter that they are started with is a script that answers ``/health``.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sdp_lightning.engines.servers import managed as server_module
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig
from sdp_lightning.errors import EngineError
from support.listening import listening
from support.managed_servers import fake_python, no_gpu
from support.network_page import check, places
from support.paths import ROOT
from support.real_vllm import assert_gone

__all__ = ["fake_python", "no_gpu"]  # fixtures


def make_servers(python: str, folder: Path, **settings: Any) -> ManagedServers:
    config = ServerConfig("some/model", python=python, log_folder=str(folder), **settings)
    return ManagedServers(config, grace_s=0.5)


def read_pids(folder: Path, index: int = 0) -> list[int]:
    """The server's and its child's."""
    said = json.loads((folder / f"server-{index}.log").read_text().splitlines()[0])
    return [said["pid"], said["child"]]


def test_two_replicas_get_ports_and_cores_of_their_own(fake_python: str, tmp_path: Path):
    available = sorted(os.sched_getaffinity(0))
    cores = available[0], available[-1]
    bound = tuple(map(str, cores))
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2, cores=bound)
    try:
        urls = servers.start()
        assert len(set(urls)) == 2 and urls == servers.urls == servers.start()
        for index in (0, 1):
            log = (tmp_path / "logs" / f"server-{index}.log").read_text()
            assert json.loads(log.splitlines()[0])["cores"] == [cores[index]]
    finally:
        servers.close()


def test_closing_ends_server_and_children_and_can_be_done_twice(fake_python: str, tmp_path: Path):
    """Until then it listens where the page of the network says, and only its user sees its key."""
    servers = make_servers(fake_python, tmp_path / "logs")
    [url] = servers.start("sk-do-not-tell")
    pids = [*servers.process_ids, *read_pids(tmp_path / "logs")]
    sockets = listening(*pids)
    assert {port for _, port in sockets} == {urlsplit(url).port}
    check(sockets, places("vllm://launch", "each server"))
    for pid in pids:
        assert b"sk-do-not-tell" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"VLLM_API_KEY=sk-do-not-tell" in Path(f"/proc/{pids[1]}/environ").read_bytes()
    servers.close()
    servers.close()
    assert_gone(pids)
    assert servers.urls == []


@pytest.mark.fault("hang", "teardown")
def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    servers = make_servers(fake_python, tmp_path / "logs")
    servers.start()
    pids = [*servers.process_ids, *read_pids(tmp_path / "logs")]
    start = time.monotonic()
    servers.close()
    assert time.monotonic() - start >= servers.grace_s
    assert_gone(pids)


def test_a_server_that_dies_is_an_error_with_the_end_of_its_log_and_nothing_is_left(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "second dies")
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2)
    with pytest.raises(EngineError, match=r"ended with 3 before(.|\n)*no such model") as caught:
        servers.start()
    assert "line 39" in str(caught.value) and "line 5\n" not in str(caught.value)
    assert_gone(pid for index in (0, 1) for pid in read_pids(tmp_path / "logs", index))


def test_a_server_that_is_late_is_an_error_with_the_end_of_its_log_and_nothing_is_left(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "late")
    servers = make_servers(fake_python, tmp_path / "logs", startup_timeout_s=3.0)
    with pytest.raises(EngineError, match=r"not ready within 3 s(.|\n)*still loading"):
        servers.start()
    assert_gone(read_pids(tmp_path / "logs"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/die", ["Its process ended with 7. The end of ", "\nCUDA error: device-side assert"]),
        ("/kill", ["Its process ended with 137 (killed by signal 9). The end of "]),
    ],
)
def test_a_server_that_dies_later_is_explained_and_the_others_run_on(
    fake_python: str, tmp_path: Path, path: str, said: list[str]
):
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2)
    try:
        first, second = servers.start()
        with pytest.raises((http.client.HTTPException, OSError)):
            urllib.request.urlopen(second + path, timeout=10.0)
        assert_gone(servers.process_ids[1:])
        told = servers.explain(second)
        assert all(text in told for text in [*said, str(tmp_path / "logs" / "server-1.log")]), told
        assert len(told) < 2**17
        running = servers.explain(first)
        assert running.startswith(f"The end of {tmp_path / 'logs' / 'server-0.log'}:\n")
        assert "ended" not in running
        (tmp_path / "logs" / "server-0.log").unlink()
        assert servers.explain(first).startswith("Its log cannot be read: ")
        assert servers.explain("http://127.0.0.1:1") == ""
    finally:
        servers.close()


def test_an_interrupted_start_leaves_nothing(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(url: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module, "_is_healthy", interrupt)
    servers = make_servers(fake_python, tmp_path / "logs")
    with pytest.raises(KeyboardInterrupt):
        servers.start()
    assert servers.process_ids == []


def test_a_port_that_is_taken_is_refused_instead_of_taking_its_server_for_ours(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        servers = make_servers("/nowhere", tmp_path / "logs", port=port)
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is taken"):
            servers.start()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path):
    servers = make_servers("/nowhere/python", tmp_path / "logs")
    with pytest.raises(EngineError, match="/nowhere/python"):
        servers.start()


PARENT = """
import json, signal, sys
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig, _is_healthy

servers = ManagedServers(ServerConfig("m", python=sys.argv[1], log_folder=sys.argv[2],
                                      devices=("cpu",)))
try:
    servers.start()
    print(json.dumps(servers.process_ids), flush=True)
    while True:
        signal.pause()
except KeyboardInterrupt:
    print(json.dumps(_is_healthy(servers.urls[0])), flush=True)
    servers.close()
"""


def start_parent(fake_python: str, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    command = [sys.executable, "-c", PARENT, fake_python, str(folder)]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    guards: list[int] = json.loads(parent.stdout.readline())
    return parent, [*guards, *read_pids(folder)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.fault("process killed", "teardown")
def test_a_killed_parent_takes_guard_server_and_their_children_with_it(
    fake_python: str, tmp_path: Path, number: signal.Signals
):
    parent, pids = start_parent(fake_python, tmp_path / "logs")
    with parent:
        parent.send_signal(number)
    assert parent.returncode == -number
    assert_gone(pids)


@pytest.mark.fault("process killed", "teardown")
def test_a_guard_that_is_killed_itself_takes_its_server_with_it(fake_python: str, tmp_path: Path):
    servers = make_servers(fake_python, tmp_path / "logs")
    servers.start()
    try:
        server, child = read_pids(tmp_path / "logs")  # vLLM ends its own children
        os.kill(servers.process_ids[0], signal.SIGKILL)
        assert_gone([server])
        os.kill(child, signal.SIGKILL)
    finally:
        servers.close()


def test_ctrl_c_reaches_the_parent_alone_which_then_ends_the_server(
    fake_python: str, tmp_path: Path
):
    parent, pids = start_parent(fake_python, tmp_path / "logs")
    with parent:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
        assert parent.stdout is not None
        assert json.loads(parent.stdout.readline()) is True
    assert parent.returncode == 0
    assert_gone(pids)
