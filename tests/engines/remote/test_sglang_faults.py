"""The engine on SGLang servers that fail: recovery or a named error, never a hang."""

from __future__ import annotations

import pytest

from sdp_lightning.errors import EngineError
from support.fake_servers import (
    assert_nothing_left,
    connected,
    is_back,
    limits,
    make_engine,
    servers,
)
from support.remote_engines import Sending, generate, publish, request
from support.sglang_engines import SGLangServer, pair

__all__ = ["pair"]  # the fixture on which "one" and "two" rest

GENERATE = "/generate"


# Faults -------------------------------------------------------------------------------------------

KINDS = ["500", "hang", "disconnect", "deep", "odd", "truncated"]


CONNECT = ["/server_info", "/model_info", GENERATE, "/continue_generation"]


PHASES = {
    "pause": "/pause_generation",
    "load": "/update_weights_from_disk",
    "set version": "/update_weight_version",
    "verify": "/model_info",
    "resume": "/continue_generation",
}


SPECIAL = [("load", "load"), ("set version", "ignored"), ("verify", "wrong")]


@pytest.mark.parametrize("kind", ["500", "hang", "garbage", "odd"])
@pytest.mark.parametrize("path", CONNECT)
def test_a_fault_while_connecting_names_the_server(one: SGLangServer, path: str, kind: str):
    one.fault(path, kind)
    with pytest.raises(EngineError, match=f"cannot use the sglang server at {one.url}"):
        make_engine(one, **limits(kind)).start()
    assert_nothing_left()


@pytest.mark.parametrize(
    ("phase", "kind"),
    [*[(phase, kind) for phase in PHASES for kind in ("500", "hang", "truncated")], *SPECIAL],
)
@pytest.mark.fault("exception", "publish", only="-(500|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault("corrupted data", "publish", only="-(truncated|ignored|wrong)$")
def test_a_fault_in_a_publish_of_two_costs_one_server_which_comes_back(
    two: list[SGLangServer], phase: str, kind: str
):
    well, ill = two
    with connected(*two, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        ill.fault(PHASES[phase], kind)
        publish(engine, 1)
        assert engine.version == 1 and engine.num_serving == 1
        ill.do(faults=[])
        is_back(engine, well, 2)
        for server in two:
            state = server.do()
            assert state["version"] == "1" and state["weights"] == {"a": 1.0, "b": 1.0}
            assert not state["paused"] and not state["dead"]
        sending = Sending(engine, [request() for _ in range(4)])
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}


@pytest.mark.parametrize(
    ("phase", "kind", "message"),
    [
        ("load", "load", "Failed to update weights"),
        ("set version", "ignored", "reports version '0' instead of 1"),
        ("verify", "wrong", "reports version '41' instead of 1"),
    ],
)
@pytest.mark.fault("exception", "publish", only="^load-")
@pytest.mark.fault("corrupted data", "publish", only="^(set version|verify)-")
def test_a_fault_in_a_publish_to_the_only_server_is_a_named_error(
    one: SGLangServer, phase: str, kind: str, message: str
):
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault(PHASES[phase], kind)
        with pytest.raises(EngineError, match=f"0 servers are left.*{message}"):
            publish(engine, 1)
        with pytest.raises(EngineError, match="unusable since"):
            generate(engine, request())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("exception", "generate", only="^(500|disconnect)$")
@pytest.mark.fault("hang", "generate", only="^hang$")
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|deep|truncated)$")
def test_a_fault_while_generating_is_sent_again(one: SGLangServer, kind: str):
    with connected(one, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        publish(engine, 1)
        one.fault(GENERATE, kind, times=1)
        [segment] = generate(engine, request())
        assert segment.version == 1 and len(segment) == 4
        assert engine.num_generated == 4


def test_a_server_that_restarted_unseen_is_not_believed(one: SGLangServer):
    with connected(one, health_interval_s=1000.0, recover_s=0.5) as engine:
        publish(engine, 5, reset=True)
        one.do(reset={})
        with pytest.raises(EngineError, match=r"under version 'default' and not under 5 to 5"):
            generate(engine, request())
        assert engine.num_generated == 0 and engine.num_serving == 0


@pytest.mark.fault("process killed", "generate")
def test_the_requests_of_a_lost_server_go_elsewhere():
    with servers(2, "--held", kind=SGLangServer) as [well, ill], connected(well, ill) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request() for _ in range(8)])
        for server in (well, ill):
            server.wait(running=4)
        ill.kill()
        well.wait(running=8)  # all of them
        well.do(held=False)
        assert sending.join() == ["length"] * 8
        assert engine.num_generated == 32 and engine.num_serving == 1
        ill.restart()
        is_back(engine, well, 2)
        assert ill.do()["version"] == "0" and ill.do()["weights"] == {"a": 0.0, "b": 0.0}
