"""A request that gets no token is sent again alone; several of them take their server out."""

from __future__ import annotations

import logging
import re

import pytest

from sdp_lightning.engines.remote import silence
from sdp_lightning.engines.remote.backend import Chunk
from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.engines.remote.silence import Silence, Tries
from sdp_lightning.errors import EngineError
from support.fake_servers import GENERATE, Server, connected
from support.remote_engines import Sending, generate, publish, request

SHORT_S = 0.4


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(silence, "monotonic", lambda: self.now_s)


def at(replica: Replica, *, budget: int = 50, tries: Tries | None = None) -> Silence:
    return Silence(replica, request(budget=budget), tries or Tries(), 10.0)


def test_deadlines_grow_with_the_budget_and_double_after_a_silence(monkeypatch: pytest.MonkeyPatch):
    Clock(monkeypatch)
    replica = Replica("http://x")
    assert at(replica).due_s == 100 + 10 + 5  # 0.1 s a token, as it does not count them
    assert at(replica, budget=1000).due_s == 100 + 10 + 100
    assert at(replica, tries=Tries(silent=[replica])).due_s == 100 + 2 * (10 + 5)
    replica.num_sampled = 7.0
    assert at(replica, budget=1000).due_s == 100 + 10


def test_a_sign_of_the_server_extends_the_silence_until_the_budget_is_over(
    monkeypatch: pytest.MonkeyPatch,
):
    clock, replica = Clock(monkeypatch), Replica("http://x", num_sampled=7.0)
    waiting = at(replica)
    for heard_s, due_s in ((50, 110), (120, 130), (149, 159), (155, 160), (900, 160)):
        replica.heard_s = heard_s  # 160: 100, 10 and 50 tokens at 1 s
        assert waiting.due_s == due_s
    clock.now_s = 155.0
    waiting._on_chunk(Chunk((3,), (-0.1,)))  # from its first token on, only its own count
    assert waiting.due_s == 155 + 10
    clock.now_s = 163.0
    waiting._on_chunk(Chunk((), ()))
    assert waiting.due_s == 155 + 10


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_silent_request_is_sent_again_alone(
    one: Server, stream: bool, caplog: pytest.LogCaptureFixture
):
    one.do(held=True)
    with connected(one, request_timeout_s=SHORT_S, stream=stream) as engine:
        publish(engine, 0, reset=True)
        one.fault(GENERATE, "hang", times=1)
        quiet = Sending(engine, [request()])
        one.wait(**{GENERATE: 3})  # two probes, and it
        one.do(held=False)
        others = Sending(engine, [request() for _ in range(6)])
        assert others.join() == ["length"] * 6 and quiet.join() == ["length"]
        assert one.do()["received"][GENERATE] == 2 + 1 + 6 + 1
        assert engine.num_serving == 1
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "(request_timeout_s=0.4, max_new_tokens=4)" in warning and "alone is sent" in warning


def test_a_stream_that_falls_silent_keeps_its_tokens(one: Server):
    one.do(held=True)
    with connected(one, request_timeout_s=SHORT_S, stream=True) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request(budget=40)])
        one.wait(running=1)
        one.do(step=20)  # of which the first 17 are two chunks
        assert sending.join() == ["abort"]
        assert [len(segment) for segment in sending.segments[0]] == [17]
        assert engine.num_serving == 1


def test_a_request_that_is_always_silent_fails_alone_with_the_setting(two: list[Server]):
    with connected(*two, request_timeout_s=0.1, max_tries=3) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.fault(GENERATE, "hang")
        with pytest.raises(EngineError, match=r"raise request_timeout_s"):
            generate(engine, request())
        sent = [server.do()["received"][GENERATE] - 2 for server in two]
        assert sorted(sent) == [1, 2]  # the other one first
        assert engine.num_serving == 2


def test_several_silent_requests_take_their_server_out(
    two: list[Server], caplog: pytest.LogCaptureFixture
):
    well, ill = two
    with connected(*two, request_timeout_s=SHORT_S, health_interval_s=60.0) as engine:
        publish(engine, 0, reset=True)
        ill.fault(GENERATE, "hang")
        sending = Sending(engine, [request() for _ in range(8)])
        assert sending.join() == ["length"] * 8
        assert engine.server_urls == [well.url]
    assert re.search(r"[34] requests in a row were silent", caplog.text)


def test_what_a_server_counts_is_a_sign_of_sampling(one: Server):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        assert engine._pool is not None
        [replica] = engine._pool.replicas
        one.do(held=True)
        sending = Sending(engine, [request()])
        one.wait(running=1)
        signs = list[float]()
        for step in (0, 2, 0):
            one.do(step=step, wait={"stalled": True})
            engine._http.run(engine._client.listen(replica), 20.0)
            signs.append(replica.heard_s)
        assert signs[0] == 0.0 < signs[1] == signs[2]
        one.do(held=False)
        assert sending.join() == ["length"]
        one.do(reset={"no_metrics": True})
        engine._http.run(engine._client.listen(replica), 20.0)
        assert replica.num_sampled is None and replica.counted_s == float("inf")


def test_a_server_is_asked_for_its_count_while_a_request_takes_long(one: Server):
    with connected(one, request_timeout_s=8.0) as engine:
        publish(engine, 0, reset=True)
        generate(engine, request())
        assert "/metrics" not in one.do()["received"]
        one.do(held=True)
        sending = Sending(engine, [request()])
        one.wait(**{"/metrics": 1})
        one.do(held=False)
        assert sending.join() == ["length"]
