"""Servers that do not say which version sampled which token: by ``/v1/completions``, as exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sdp_lightning.errors import ConfigError, EngineError
from support.fake_servers import (
    COMPLETIONS,
    GENERATE,
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
)
from support.remote_engines import Sending, assert_exact, generate, publish, publish_thrice, request
from support.rollouts import Samples, rolling


@pytest.fixture
def two(pair: list[Server]) -> list[Server]:
    for server in pair:
        server.do(reset={"no_scale_out": True}, faults=[])
    return pair


def routes(server: Server) -> list[int]:
    """How often the route with spans was asked, and the one without."""
    received = server.do()["received"]
    return [received.get(GENERATE, 0), received.get(COMPLETIONS, 0)]


def test_a_server_without_scale_out_serves_by_its_text_route(one: Server):
    with connected(one) as engine:
        publish(engine, 3, reset=True)
        [segment] = generate(engine, request(tokens=3, budget=4))
    assert segment.version == 3 and segment.token_ids.tolist() == [6, 7, 8, 9]
    assert segment.logprobs.tolist() == pytest.approx([-0.4] * 4)
    assert routes(one) == [1, 2 + 1]  # one refusal, two probes


def test_a_server_that_has_no_such_route_serves_by_the_text_route_too(one: Server):
    one.do(reset={})
    one.fault(GENERATE, "404")
    with connected(one) as engine:
        publish(engine, 3, reset=True)
        assert [s.version for s in generate(engine, request())] == [3]


def test_a_server_with_neither_route_is_named(one: Server):
    one.fault(COMPLETIONS, "404")
    with pytest.raises(EngineError, match=rf"{one.url}{COMPLETIONS} answered 404"):
        make_engine(one).start()
    assert_nothing_left()


def test_a_server_whose_probe_fails_otherwise_does_not_fall_back(one: Server):
    one.do(reset={})
    one.fault(GENERATE, "500", times=1)
    with pytest.raises(EngineError, match=rf"{one.url}{GENERATE} answered 500"):
        make_engine(one).start()
    assert_nothing_left()
    assert routes(one) == [1, 0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_versions_are_exact_across_publishes_with_requests_in_flight(one: Server, stream: bool):
    groups = publish_thrice(make_engine(one, stream=stream), one, budget=16, step=4)
    stamped = [[(s.version, len(s)) for s in g.trajectories[0].segments] for g in groups]
    assert stamped == [[(0, 4), (1, 4), (2, 4), (3, 4)]] * 8
    prompts = Counter(tuple(body["prompt"]) for body in one.do()["seen"])
    assert prompts[(1, 2, 5, 6, 7, 8)] == 8  # each is sent again with what it had


@pytest.mark.fault("process killed", "generate")
def test_a_killed_server_without_versions_takes_with_it_only_what_it_had_not_sent():
    with servers(2, "--held", "--no-scale-out") as [well, ill]:
        engine = make_engine(well, ill, stream=True)
        engine.start()
        workflow = Samples(max_new_tokens=10)
        with rolling(
            engine, workflow, batch_size=4, max_head_lag=0, rows=4, num_epochs=1
        ) as executor:
            for server in (well, ill):
                server.do(wait={"running": 2})
                server.do(step=3, wait={"streamed": 2 * 3})
            ill.kill()
            well.do(wait={"running": 4})
            well.do(held=False)
            batch = executor.take()
            assert batch is not None
            groups = list(batch)
            assert_exact(groups, 10)
            stamped = [[(s.version, len(s)) for s in g.trajectories[0].segments] for g in groups]
            assert sorted(stamped) == [[(0, 3), (0, 7)]] * 2 + [[(0, 10)]] * 2
    assert_nothing_left()


def test_servers_of_both_kinds_serve_one_engine(two: list[Server]):
    two[1].do(reset={})
    for server in two:
        server.do(held=True)
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request() for _ in range(8)])
        for server in two:
            server.wait(running=4)
            server.do(held=False)
        assert sending.join() == ["length"] * 8
        assert [(s.version, len(s)) for got in sending.segments for s in got] == [(0, 4)] * 8
    assert [routes(server) for server in two] == [[1, 2 + 4], [2 + 4, 0]]


def test_keeping_requests_across_updates_needs_versions(one: Server):
    with pytest.raises(
        ConfigError, match=rf"{one.url} .*which version sampled which token.*on_update='interrupt'"
    ):
        make_engine(one, on_update="keep").start()
    assert_nothing_left()


def test_a_server_that_comes_back_without_versions_stays_out_and_says_why(two: list[Server]):
    for server in two:
        server.do(reset={})
    well, ill = two
    with connected(*two, on_update="keep") as engine:
        publish(engine, 0, reset=True)
        ill.do(reset={"no_scale_out": True}, faults=[{"path": "/health", "kind": "500"}])
        lost = engine._running().replicas[1]
        while lost.serving:
            well.do()
        ill.do(faults=[])
        while "which version sampled which token" not in lost.why_out:
            well.do()
        publish(engine, 1)
        assert engine.num_serving == 1
        assert [s.version for s in generate(engine, request())] == [1]


def test_raw_logprobs_are_refused_by_the_text_route_too(one: Server):
    one.do(reset={"raw_logprobs": True, "no_scale_out": True})
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        make_engine(one).start()
    assert_nothing_left()
    assert routes(one) == [1, 2]


@pytest.mark.parametrize("scale_out", [True, False], ids=["tokens", "text"])
def test_an_echo_is_of_the_weights_that_sample_now(two: list[Server], scale_out: bool):
    for server in two:
        server.do(reset={"no_scale_out": not scale_out})
    with connected(*two) as engine:
        publish(engine, 4, reset=True)
        found = engine.prompt_logprobs(np.array([7, 20, 30]))
        assert found.keys() == {server.url for server in two}
        for logprobs in found.values():
            assert logprobs.dtype == np.float32
            assert logprobs.tolist() == pytest.approx([-0.5 - 0.020, -0.5 - 0.030])
        path = GENERATE if scale_out else COMPLETIONS
        two[1].fault(path, "wrong echo", times=1)
        found = engine.prompt_logprobs(np.array([7, 20, 30]))
        assert found[two[0].url].tolist() == pytest.approx([-0.52, -0.53])
        assert found[two[1].url].tolist() == pytest.approx([-1.52, -1.53])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("odd", "a prompt without prompt_logprobs of every token"),
        ("500", "answered 500"),
        ("truncated", "payload is not completed"),
    ],
)
def test_a_server_that_scores_no_prompt_is_named_once_and_samples_on(
    two: list[Server], kind: str, said: str, caplog: pytest.LogCaptureFixture
):
    with connected(*two, health_interval_s=1000.0) as engine:
        publish(engine, 0, reset=True)
        two[1].fault(COMPLETIONS, kind)
        for _ in range(2):
            assert engine.prompt_logprobs(np.array([7, 20])).keys() == {two[0].url}
        (line,) = [text for text in caplog.messages if "where a prompt is scored" in text]
        assert line.startswith(two[1].url)
        two[0].fault(COMPLETIONS, kind)
        with pytest.raises(EngineError, match=f"no server scores a prompt: .*{said}"):
            engine.prompt_logprobs(np.array([7, 20]))
        assert engine.num_serving == 2


def test_of_a_prompt_that_is_too_long_for_a_server_its_beginning_is_scored(one: Server):
    one.do(reset={"max_length": 5})
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        (found,) = engine.prompt_logprobs(np.arange(9)).values()
        assert found.tolist() == pytest.approx([-0.1 - token / 1000 for token in (1, 2, 3)])
