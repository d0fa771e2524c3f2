"""Servers that fail in every way and every phase: recovery or a named error, never a hang."""

from __future__ import annotations

from itertools import product

import pytest

from sdp_lightning.errors import EngineError
from support.fake_servers import (
    GENERATE,
    Server,
    assert_nothing_left,
    connected,
    is_back,
    limits,
    make_engine,
)
from support.remote_engines import Sending, generate, publish, request

KINDS = ["500", "hang", "disconnect", "garbage", "odd", "deep", "truncated"]


# Every phase, every fault -------------------------------------------------------------------------

CONNECT = ["/health", "/v1/models", GENERATE, "/resume"]


ALSO_ASKED = ["/weight_info", "/get_world_size", "/collective_rpc"]


PHASES = {
    "pause": "/pause",
    "load": "/collective_rpc",
    "set version": "/update_weight_version",
    "verify": "/weight_info",
    "resume": "/resume",
}


@pytest.mark.parametrize(
    ("path", "kind"),
    [*product(CONNECT, KINDS), *product(ALSO_ASKED, ["500", "disconnect", "garbage"])],
)
def test_a_fault_while_connecting_names_the_server(one: Server, path: str, kind: str):
    one.fault(path, kind)
    engine = make_engine(one, **limits(kind))
    if kind == "odd" and path == "/health":  # its status alone counts
        engine.start()
        engine.close()
    else:
        with pytest.raises(EngineError, match=f"cannot use the vllm server at {one.url}"):
            engine.start()
    assert_nothing_left()


@pytest.mark.parametrize("kind", [*KINDS, "ignored", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault("corrupted data", "publish", only="-(garbage|odd|deep|truncated|wrong|ignored)$")
def test_a_fault_in_a_publish_of_two_costs_one_server_which_comes_back(
    two: list[Server], phase: str, kind: str
):
    well, ill = two
    with connected(*two, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        ill.fault(PHASES[phase], kind)
        publish(engine, 1)
        assert engine.version == 1
        ill.do(faults=[])
        is_back(engine, well, 2)
        for server in two:
            assert server.do()["version"] == "1" and server.do()["weights"] == {"a": 1.0, "b": 1.0}
        sending = Sending(engine, [request() for _ in range(4)])
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}


@pytest.mark.parametrize("kind", ["500", "hang", "disconnect", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault("corrupted data", "publish", only="-(garbage|odd|deep|truncated|wrong|ignored)$")
def test_a_fault_in_a_publish_under_requests_that_servers_keep_loses_none_of_them(
    two: list[Server], phase: str, kind: str
):
    well, ill = two
    options = limits(kind, recover_s=30.0) | {"on_update": "keep", "request_timeout_s": 60.0}
    with connected(*two, **options) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.do(held=True)
        sending = Sending(engine, [request() for _ in range(4)])
        for server in two:
            server.do(wait={"running": 2})
        ill.fault(PHASES[phase], kind)
        publish(engine, 1)
        ill.do(faults=[])
        for server in two:
            server.do(held=False)
        assert sending.join() == ["length"] * 4
        assert {s.version for got in sending.segments for s in got} == {1}
        is_back(engine, well, 2)
        assert ill.do()["version"] == "1"


@pytest.mark.parametrize("kind", [*KINDS, "ignored", "wrong", "load"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault("exception", "publish", only="-(500|disconnect|load)$")
@pytest.mark.fault("hang", "publish", only="-hang$")
@pytest.mark.fault("corrupted data", "publish", only="-(garbage|odd|deep|truncated|wrong|ignored)$")
def test_a_fault_in_a_publish_to_the_only_server_is_a_named_error(
    one: Server, phase: str, kind: str
):
    path, held = PHASES[phase], {"ignored": "0", "wrong": "41"}
    harmless = (kind, phase) not in [("ignored", "set version"), ("wrong", "verify")] and (
        kind in ("ignored", "wrong") or (kind == "load" and phase != "load")
    )
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault(path, kind)
        if harmless:
            publish(engine, 1)
            return
        # Both versions are named where the server has another one than expected.
        reason = f"reports version '{held[kind]}' instead of 1" if kind in held else ":"
        with pytest.raises(EngineError, match=rf"0 servers are left, min_replicas is 1.*{reason}"):
            publish(engine, 1)
        for call in (engine.pause, engine.resume, lambda: generate(engine, request())):
            with pytest.raises(EngineError, match="unusable since"):
                call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("exception", "generate", only="^(500|disconnect)$")
@pytest.mark.fault("hang", "generate", only="^hang$")
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|deep|truncated)$")
def test_a_fault_while_generating_is_sent_again(one: Server, kind: str):
    with connected(one, **limits(kind, recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        publish(engine, 1)
        one.fault(GENERATE, kind, times=1)
        [segment] = generate(engine, request())
        assert segment.version == 1 and len(segment) == 4
        assert engine.num_generated == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("exception", "generate", only="^(500|disconnect)$")
@pytest.mark.fault("hang", "generate", only="^hang$")
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|deep|truncated)$")
def test_a_server_that_never_samples_again_is_a_named_error(one: Server, kind: str):
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault(GENERATE, kind)
        with pytest.raises(EngineError, match=one.url):
            generate(engine, request())


@pytest.mark.parametrize("kind", ["500", "hang", "disconnect", "truncated"])
def test_an_ill_health_takes_a_server_out_until_it_is_well(one: Server, kind: str):
    with connected(one, **limits(kind)) as engine:
        publish(engine, 0, reset=True)
        one.fault("/health", kind)
        is_back(engine, one, 0)
        with pytest.raises(EngineError, match=r"no server has been left for 1.0 s.*/health"):
            generate(engine, request())
        one.do(faults=[])
        is_back(engine, one)
        assert [s.version for s in generate(engine, request())] == [0]


def test_a_publish_waits_for_the_only_server_to_come_back(one: Server):
    with connected(one, **limits("500", recover_s=30.0)) as engine:
        publish(engine, 0, reset=True)
        one.fault("/health", "500", times=1)
        is_back(engine, one, 0)
        publish(engine, 1)
        assert [s.version for s in generate(engine, request())] == [1]


@pytest.mark.fault("exception", "publish")
def test_too_few_servers_end_a_publish_with_the_reason(two: list[Server]):
    with connected(*two, **limits("500"), min_replicas=2) as engine:
        publish(engine, 0, reset=True)
        two[1].fault("/health", "500")
        is_back(engine, two[0], 1)
        with pytest.raises(EngineError, match=r"1 servers have been left for 1.0 s.*answered 500"):
            engine.pause()


@pytest.mark.fault("exception", "publish")
def test_a_publish_whose_weights_fit_nowhere_names_every_server(two: list[Server]):
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.fault("/collective_rpc", "load")
        with pytest.raises(EngineError, match=f"{two[0].url}.*safetensors.*{two[1].url}"):
            publish(engine, 1)
        assert engine.version == 0
