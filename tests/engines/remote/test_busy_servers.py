"""Servers that are busy (429, 503 with Retry-After) are asked again when they say, or others."""

from __future__ import annotations

import pytest

from sdp_lightning.engines.remote.responses import MAX_RETRY_S, retry_after_s
from sdp_lightning.errors import EngineError
from support.fake_servers import GENERATE, Server, connected
from support.raw_server import Asker, asker, http
from support.remote_engines import Sending, generate, publish, request

__all__ = ["asker"]  # a fixture

LATER = {"Retry_After": "3600"}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.1),
        ("9" * 400, MAX_RETRY_S),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:16:45 GMT", 5.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_S),
        ("Thu, 99 Jan 1970 00:00:00 GMT", None),
    ],
)
def test_a_rest_is_read_as_seconds_or_as_a_date_and_is_bounded(
    header: str | None, seconds: float | None
):
    assert retry_after_s(header, 1000.0) == seconds


@pytest.mark.parametrize(("status", "header"), [(429, "0"), (503, "0"), (503, "date")])
@pytest.mark.fault("slow", "generate")
def test_a_busy_server_is_asked_again_and_stays(one: Server, status: int, header: str):
    told = "Thu, 01 Jan 1970 00:00:00 GMT" if header == "date" else header
    with connected(one, max_tries=1) as engine:
        publish(engine, 0, reset=True)
        one.answer(GENERATE, b"slow down", status, times=2, Retry_After=told)
        assert [len(s) for s in generate(engine, request())] == [4]
        state = one.do()
        assert state["received"][GENERATE] == 2 + 2 + 1  # two probes come first
        assert len(state["loads"]) == 1  # it was never out


def test_what_a_busy_server_puts_off_goes_to_another_one_at_once(two: list[Server]):
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        two[1].answer(GENERATE, b"slow down", 429, **LATER)
        for _ in range(2):
            assert Sending(engine, [request() for _ in range(8)]).join() == ["length"] * 8
        assert engine.num_serving == 2
        assert two[1].do()["received"][GENERATE] <= 2 + 8  # the second eight never asked it


def test_servers_that_are_busy_beyond_the_deadline_are_a_named_error(one: Server):
    with connected(one, request_timeout_s=20.0) as engine:
        publish(engine, 0, reset=True)
        one.answer(GENERATE, b"slow down", 429, **LATER)
        with pytest.raises(EngineError, match=r"than is left of request_timeout_s: .*slow down"):
            generate(engine, request())
        assert engine.num_serving == 1


@pytest.mark.fault("slow", "publish")
def test_a_publish_does_not_wait_for_a_busy_server(one: Server):
    with connected(one, request_timeout_s=600.0) as engine:
        publish(engine, 0, reset=True)
        one.answer(GENERATE, b"slow down", 429, **LATER)
        sending = Sending(engine, [request()])
        one.wait(**{GENERATE: 3})
        publish(engine, 1)
        assert sending.join() == ["abort"] and sending.segments == [[]]


@pytest.mark.fault("slow", "publish")
def test_a_publish_asks_a_busy_server_again(one: Server):
    paths = ["/pause", "/collective_rpc", "/update_weight_version", "/weight_info", "/resume"]
    busy = {"kind": "answer", "status": 503, "body": "", "headers": {"Retry-After": "0"}}
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        before = one.do()["received"]
        one.do(faults=[busy | {"path": path, "times": 1} for path in paths])
        publish(engine, 1)
        state = one.do()
        assert engine.num_serving == 1 and state["version"] == "1"
        more = [state["received"][path] - before.get(path, 0) for path in paths]
        assert more == [2, 2, 3, 3, 2]  # set and read twice in a publish


def test_a_control_call_ends_by_its_own_deadline(asker: Asker):
    busy = http(b"later", "Retry-After: 50", status="503 Busy")
    with pytest.raises(EngineError, match="answered 503: later"):
        asker.version(busy)
