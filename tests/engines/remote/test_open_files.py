"""Too many open files are this process's own: its limit is raised or named, no server is out."""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Iterator

import pytest

from sdp_lightning.engines.remote.open_files import connections_allowed, open_files_error
from support.fake_servers import Server, connected
from support.remote_engines import Sending, publish, request

NOFILE = resource.RLIMIT_NOFILE


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """Soft and hard limit of open files, which are restored."""
    before = resource.getrlimit(NOFILE)
    yield before
    resource.setrlimit(NOFILE, before)


def num_open() -> int:
    return len(os.listdir("/dev/fd")) - 1


def test_the_soft_limit_is_raised_as_far_as_requests_need(limits: tuple[int, int]):
    resource.setrlimit(NOFILE, (num_open() + 20, limits[1]))
    assert connections_allowed(100) == 100
    assert resource.getrlimit(NOFILE)[0] == num_open() + 100 + 64
    assert connections_allowed(50) == 50
    assert resource.getrlimit(NOFILE)[0] == num_open() + 100 + 64


def test_where_the_hard_limit_is_too_low_fewer_requests_are_sent_and_it_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    files = "sdp_lightning.engines.remote.open_files"
    monkeypatch.setattr(f"{files}._num_open", lambda: 40)
    raised = list[tuple[int, tuple[int, int]]]()
    monkeypatch.setattr(resource, "setrlimit", lambda *what: raised.append(what))
    for hard, allowed in ((400, 296), (96, 32), (41, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (30, hard))
        caplog.clear()
        assert connections_allowed(768) == allowed  # less 40, and 64 or a quarter
        assert f"no more than {hard} files open (ulimit -n): it sends {allowed} " in caplog.text
        assert raised.pop() == (NOFILE, (hard, hard))


def test_requests_wait_for_files_and_their_server_stays(
    one: Server, limits: tuple[int, int], caplog: pytest.LogCaptureFixture
):
    one.do(reset={"reply_s": 0.02})
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        resource.setrlimit(NOFILE, (num_open() + 6, limits[1]))  # 3 are those of a loop
        sending = Sending(engine, [request() for _ in range(10)])
        results = sending.join()
        resource.setrlimit(NOFILE, limits)
        assert results == ["length"] * 10
        assert engine.num_serving == 1
        assert one.do()["connections"] < 10
    assert not [r for r in caplog.records if r.levelno > logging.INFO and "out" in r.getMessage()]


def test_an_error_that_hides_the_limit_is_seen_by_its_effect(limits: tuple[int, int]):
    hidden = OSError(-11, "System error")  # what the resolver of names says
    assert open_files_error(hidden) is None
    text = str(open_files_error(OSError(errno.ENFILE, "")))
    assert text.startswith("this machine has as many files open")
    resource.setrlimit(NOFILE, (3, limits[1]))
    error = open_files_error(hidden)
    resource.setrlimit(NOFILE, limits)
    assert "this process has 3 files open, as many as it may" in str(error)
    assert "ulimit -n" in str(error)
