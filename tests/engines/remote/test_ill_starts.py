"""Servers that are not well when a run starts: the others begin, and it is taken in later."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from sdp_lightning.engines.remote.make_transport import make_transport
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.errors import ConfigError, EngineError
from support.fake_servers import (
    GENERATE,
    Server,
    assert_nothing_left,
    connected,
    is_back,
    limits,
    make_engine,
    weights,
)
from support.remote_engines import Sending, publish, request

ILL = [
    *[("/health", "500"), ("/health", "deep"), ("/v1/models", "garbage")],
    *[(GENERATE, "odd"), (GENERATE, "hang")],
    *[("/resume", "disconnect"), ("/collective_rpc", "404")],
]


def said_left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is left out until it is" in r.getMessage()]


@pytest.mark.parametrize(("path", "kind"), ILL)
@pytest.mark.fault("exception", "start", only="-(500|404|disconnect)$")
@pytest.mark.fault("hang", "start", only="-hang$")
@pytest.mark.fault("corrupted data", "start", only="-(deep|garbage|odd)$")
def test_the_run_starts_with_the_server_that_is_well_and_takes_the_other_in(
    two: list[Server], path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    ill, well = two
    ill.fault(path, kind)
    with connected(*two, **limits(kind, recover_s=30.0)) as engine:
        assert engine.server_urls == [well.url]
        (said,) = said_left_out(caplog)
        assert said.startswith(f"{ill.url} is left out") and path.rpartition("/")[2] in said
        publish(engine, 0, reset=True)
        assert Sending(engine, [request() for _ in range(3)]).join() == ["length"] * 3
        ill.do(faults=[])
        is_back(engine, well, 2)
        publish(engine, 1)
        for server in two:
            assert server.do()["version"] == "1" and server.do()["weights"] == {"a": 1.0, "b": 1.0}
        assert len(said_left_out(caplog)) == 1


@pytest.mark.fault("process killed", "start")
def test_a_server_that_is_not_there_yet_serves_when_it_is(
    fresh: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    late, well = fresh
    late.kill()
    with connected(*fresh, recover_s=30.0) as engine:
        assert len(said_left_out(caplog)) == 1
        publish(engine, 0, reset=True)
        late.restart()
        is_back(engine, well, 2)
        assert late.do()["version"] == "0"


@pytest.mark.fault("slow", "start")
def test_a_server_that_is_busy_at_the_start_is_asked_again_and_is_not_left_out(
    two: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    for server, path in zip(two, ("/health", GENERATE), strict=True):
        server.answer(path, b"slow down", 429, times=2, Retry_After="0")
    with connected(*two) as engine:
        assert engine.server_urls == [server.url for server in two]
    assert said_left_out(caplog) == []


@pytest.mark.parametrize("num_ill", [1, 2])
def test_fewer_than_min_replicas_are_the_named_error(two: list[Server], num_ill: int) -> None:
    for server in two[:num_ill]:
        server.fault("/v1/models", "garbage")
    engine = make_engine(*two, min_replicas=3 - num_ill)
    with pytest.raises(EngineError, match=f"cannot use the vllm server at {two[0].url}.*Is it"):
        engine.start()
    assert_nothing_left()


def test_a_server_that_cannot_do_what_is_set_stays_out(
    two: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    older, well = two
    older.do(reset={"no_scale_out": True})
    with connected(*two, on_update="keep") as engine:
        publish(engine, 0, reset=True)
        assert "does not report which version sampled which token" in said_left_out(caplog)[0]
        older.wait(**{"/pause": 2})  # it is tried again and again
        assert engine.server_urls == [well.url]
    older.do(reset={"no_scale_out": True})  # it was perhaps being loaded, and is asked later then
    with pytest.raises(ConfigError, match="does not report"):
        make_engine(older, on_update="keep").start()
    assert_nothing_left()


@pytest.mark.parametrize("stays_ill", [False, True])
def test_another_rank_uses_a_server_from_the_publish_on_that_the_leading_one_took_it_in(
    two: list[Server], stays_ill: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ill, well = two
    ill.fault("/v1/models", "garbage")
    with connected(*two, recover_s=30.0) as leader, closing(make_engine(*two)) as follower:
        follower.join(leader.server_urls)
        assert follower.server_urls == [well.url]
        leader.pause()
        leader.update_weights(weights(0.0), 0, reset=True)
        follower.follow(0, leader.server_urls)
        for engine in (leader, follower):
            engine.resume()
        ill.do(faults=[])
        is_back(leader, well, 2)
        follower.pause()
        leader.pause()
        leader.update_weights(weights(1.0), 1)
        follower.follow(1, leader.server_urls)
        assert follower.server_urls == [well.url], "it is not asked before it samples again"
        leader.resume()
        if stays_ill:
            ill.fault(GENERATE, "500")
        follower.resume()
        assert follower.num_serving == 2 - stays_ill
        assert len(said_left_out(caplog)) == 1 + stays_ill
        assert Sending(follower, [request() for _ in range(4)]).join() == ["length"] * 4
        ran: dict[str, Any] = ill.do()
        assert (len(ran["seen"]) > 0) is not stays_ill


def test_a_first_server_whose_host_is_unknown_leaves_the_address_to_the_second() -> None:
    urls = ["http://no-such-host.invalid:8000", "http://127.0.0.1:8000"]
    options = RemoteOptions(transport="tcp", api_key="a-key-of-16-signs")
    with pytest.raises(EngineError, match="there is no route"):
        make_transport(options, urls[:1])
    make_transport(options, ["http://no-such-host.invalid:8000", "http://127.0.0.2:8000"]).close()
