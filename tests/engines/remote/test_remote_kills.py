"""Servers that restart, freeze or are killed: recovery or a named error, never a hang."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from sdp_lightning.errors import EngineError, RolloutError
from support.fake_servers import (
    Server,
    assert_nothing_left,
    connected,
    is_back,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import Sending, assert_exact, generate, publish, request
from support.rollouts import Samples, rolling, wait_until

# Restarts, freezes, kills -------------------------------------------------------------------------


@pytest.mark.fault("corrupted data", "generate")
def test_a_server_that_restarted_unseen_is_not_believed(one: Server):
    with connected(one, health_interval_s=1000.0, recover_s=0.5) as engine:
        publish(engine, 5, reset=True)
        one.do(reset={})
        with pytest.raises(EngineError, match=r"under version 'default' and not under 5 to 5"):
            generate(engine, request())
        assert engine.num_generated == 0 and engine.num_serving == 0


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_restarted_before_a_publish_is_given_all_weights(one: Server):
    with connected(one, health_interval_s=1000.0) as engine:
        engine.pause()
        engine.update_weights(weights(1.0, "a", "b"), 0, reset=True)
        engine.resume()
        one.do(reset={})
        engine.pause()
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
        assert one.do()["weights"] == {"a": 1.0, "b": 2.0}
        assert [s.version for s in generate(engine, request())] == [1]


@pytest.mark.fault("hang", "generate")
def test_a_frozen_server_loses_its_requests_and_returns_at_the_present_version(fresh: list[Server]):
    well, ill = fresh
    for server in fresh:
        server.do(held=True)
    with connected(*fresh, health_timeout_s=1.5) as engine:
        engine.pause()
        engine.update_weights(weights(1.0, "a", "b"), 0, reset=True)
        engine.resume()
        sending = Sending(engine, [request() for _ in range(8)])
        for server in fresh:
            server.wait(running=4)
        ill.signal(signal.SIGSTOP)
        well.wait(running=8)  # all of them
        well.do(held=False)
        assert sending.join() == ["length"] * 8
        assert engine.num_generated == 32
        engine.pause()
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
        assert engine.num_serving == 1
        ill.signal(signal.SIGCONT)
        ill.do(held=False)
        is_back(engine, well, 2)
        state = ill.do()
        assert state["version"] == "1" and state["weights"] == {"a": 1.0, "b": 2.0}
        assert not state["paused"] and not state["dead"]


def finish(executor: Any, server: Server, first: int, last: int) -> list[Any]:
    """Train from version ``first`` to ``last``."""
    groups: list[Any] = []
    for version in range(first, last + 1):
        batch = executor.take()
        groups += batch
        executor.publish(weights(float(version)), version)
    return groups


@pytest.mark.parametrize("again", [False, True], ids=["it stays away", "it comes back"])
@pytest.mark.fault("process killed", "generate")
def test_a_server_killed_while_generating_costs_nothing(fresh: list[Server], again: bool):
    well, ill = fresh
    for server in fresh:
        server.do(held=True)
    engine = make_engine(*fresh)
    engine.start()
    workflow = Samples(group_size=2, max_new_tokens=6)
    with rolling(engine, workflow, batch_size=4, max_head_lag=1, rows=8, num_epochs=1) as executor:
        for server in fresh:
            server.wait(running=4)
            server.do(step=2, wait={"stalled": True})
        ill.kill()
        well.do(held=False, wait={})
        if again:
            ill.restart()
        groups = finish(executor, well, 1, 2)
        assert executor.take() is None
        assert sorted(g.row_id for g in groups) == sorted(f"row{n}" for n in range(8))
        assert_exact(groups, 6)
        if again:
            is_back(engine, well, 2)
            assert ill.do()["version"] == "2"
        else:
            assert engine.num_serving == 1
    assert_nothing_left()


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/weight_info", "/resume"])
@pytest.mark.fault("process killed", "publish")
def test_a_server_killed_in_a_publish_costs_nothing(fresh: list[Server], path: str):
    well, ill = fresh
    engine = make_engine(*fresh)
    engine.start()
    with rolling(engine, batch_size=4, max_head_lag=1, rows=12, num_epochs=1) as executor:
        groups = finish(executor, well, 1, 1)
        ill.fault(path, "hang")
        killer = KillWhen(ill, path)
        groups += finish(executor, well, 2, 3)
        killer.join()
        assert executor.take() is None
        assert sorted(g.row_id for g in groups) == sorted(f"row{n}" for n in range(12))
        assert_exact(groups, 4)
        assert engine.num_serving == 1 and well.do()["version"] == "3"
    assert_nothing_left()


class KillWhen:
    """Kills a server when it is next asked for ``path``."""

    def __init__(self, server: Server, path: str) -> None:
        count = server.do()["received"].get(path, 0)

        def work() -> None:
            server.do(wait={path: count + 1})
            server.kill()

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60.0)


@pytest.mark.fault("process killed", "generate")
def test_the_last_server_killed_is_a_named_error_in_the_trainer():
    with servers(1, "--held") as [server]:
        engine = make_engine(server, recover_s=0.5)
        engine.start()
        with rolling(engine, batch_size=2) as executor:
            server.wait(running=6)
            server.kill()
            with pytest.raises(RolloutError, match=r"no server has been left for 0.5 s"):
                executor.take()
    assert_nothing_left()


@pytest.mark.fault("process killed", "publish")
def test_the_last_server_killed_in_a_publish_is_a_named_error():
    with servers(1) as [server]:
        engine = make_engine(server, recover_s=0.5)
        engine.start()
        with rolling(engine, batch_size=2, max_head_lag=0) as executor:
            wait_until(executor, lambda: executor.stat.pending == 2)
            executor.take()
            server.kill()
            with pytest.raises(EngineError, match=rf"{server.url}"):
                executor.publish(weights(1.0), 1)
    assert_nothing_left()
