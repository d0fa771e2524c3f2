"""The engine of servers, against fake vLLM processes: exact versions, pauses, loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.errors import EngineError, VersionError
from support.fake_servers import (
    COMPLETIONS,
    GENERATE,
    Server,
    connected,
    make_engine,
    weights,
)
from support.remote_engines import Sending, assert_exact, generate, publish, publish_thrice, request
from support.rollouts import rolling

# Versions -----------------------------------------------------------------------------------------


def test_a_request_comes_back_with_the_version_that_sampled_it(one: Server):
    with connected(one) as engine:
        publish(engine, 3, reset=True)
        [segment] = generate(engine, request(tokens=3, budget=4))
    assert segment.version == 3 and segment.token_ids.tolist() == [6, 7, 8, 9]
    assert segment.logprobs.tolist() == pytest.approx([-0.4] * 4)
    assert segment.kv_on_update == "recompute"
    assert engine.num_generated == 4 and engine.version == 3


def test_nothing_is_sampled_before_the_first_publish(one: Server):
    refused = pytest.raises(EngineError, match="publish with reset=True first")
    with connected(one) as engine, refused:
        generate(engine, request())
    assert one.do()["seen"] == []


@pytest.mark.parametrize("mode", ["interrupt", "keep"])
def test_three_publishes_under_eight_requests_lose_and_double_nothing(one: Server, mode: str):
    groups = publish_thrice(make_engine(one, on_update=mode), one, budget=16, step=4)
    stamped = [[(s.version, len(s)) for s in g.trajectories[0].segments] for g in groups]
    assert stamped == [[(0, 4), (1, 4), (2, 4), (3, 4)]] * 8
    prompts = Counter(tuple(body["token_ids"]) for body in one.do()["seen"])
    assert prompts[(1, 2)] >= 8
    if mode == "interrupt":  # each is resent with what it had, to the original budget
        assert prompts[(1, 2, 5, 6, 7, 8)] == 8


def test_keep_splits_a_response_at_the_spans_of_the_server(one: Server):
    one.do(held=True)
    with connected(one, on_update="keep") as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request(budget=5)])
        one.do(wait={"running": 1})
        one.do(step=2, wait={"stalled": True})
        publish(engine, 1)
        one.do(held=False)
        assert sending.join() == ["length"]
    assert [(s.version, len(s)) for s in sending.segments[0]] == [(0, 2), (1, 3)]
    assert engine.updates_in_flight and len(one.do()["seen"]) == 1


@pytest.mark.parametrize(("policy", "clear"), [("recompute", "true"), ("keep", "false")])
def test_the_cache_policy_reaches_server_and_segments(one: Server, policy: str, clear: str):
    with connected(one, kv_on_update=policy) as engine:
        publish(engine, 0, reset=True)
        assert one.do()["clear_cache"] == clear
        [segment] = generate(engine, request())
        assert segment.kv_on_update == policy


def test_a_request_that_comes_after_the_pause_returns_and_is_sent_again(one: Server):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        engine.pause()
        late = Sending(engine, [request()])
        assert late.join() == ["abort"] and late.segments == [[]]
        assert one.do()["seen"] == []
        engine.update_weights(weights(1.0), 1)
        engine.resume()
        assert [s.version for s in generate(engine, request())] == [1]


def send_too_late(engine: RemoteInfEngine, server: Server) -> Sending:
    """A request that waits at a server that is paused, as one does that comes after the pause."""
    urlopen_pause(server)
    path = COMPLETIONS if server.do()["no_scale_out"] else GENERATE
    before = server.do()["received"][path]
    sending = Sending(engine, [request()])
    server.wait(**{path: before + 1})
    return sending


@pytest.mark.parametrize("no_scale_out", [False, True], ids=["spans", "no spans"])
def test_a_request_that_reaches_the_server_after_its_pause_is_taken_back(
    one: Server, no_scale_out: bool
):
    one.do(reset={"no_scale_out": no_scale_out})
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        sending = send_too_late(engine, one)
        engine.pause()
        assert sending.join() == ["abort"] and sending.segments == [[]]
        engine.update_weights(weights(1.0), 1)
        engine.resume()
        assert [s.version for s in generate(engine, request())] == [1]


@pytest.mark.parametrize("no_scale_out", [False, True], ids=["spans", "no spans"])
def test_a_request_of_another_client_that_comes_after_the_pause_is_taken_back_too(
    one: Server, no_scale_out: bool
):
    one.do(reset={"no_scale_out": no_scale_out})
    with connected(one) as leader, connected_to(leader, one) as follower:
        leader.pause()
        leader.update_weights(weights(0.0), 0, reset=True)
        follower.follow(0, leader.server_urls)
        for engine in (leader, follower):
            engine.resume()
        sending = send_too_late(follower, one)
        follower.pause()  # as rollout/publishing.py orders them
        leader.pause()
        follower.drain()
        assert sending.join() == ["abort"] and sending.segments == [[]]
        leader.update_weights(weights(1.0), 1)
        follower.follow(1, leader.server_urls)
        for engine in (leader, follower):
            engine.resume()
        assert [s.version for s in generate(follower, request())] == [1]
        assert one.do()["loads"] == [["a", "b"]] * 2  # the follower sends no weights


@contextmanager
def connected_to(leader: RemoteInfEngine, *running: Server) -> Iterator[RemoteInfEngine]:
    """The engine of another rank, on the servers of ``leader``."""
    engine = make_engine(*running)
    try:
        engine.join(leader.server_urls)
        yield engine
    finally:
        engine.close()


def urlopen_pause(server: Server) -> None:
    import urllib.request

    call = urllib.request.Request(f"{server.url}/pause?mode=abort", b"", method="POST")
    with urllib.request.urlopen(call, timeout=30.0) as answer:
        assert answer.status == 200


def test_a_publish_with_late_requests_does_not_take_the_time_to_drain(one: Server):
    one.do(held=True)
    engine = make_engine(one)
    engine.start()
    with rolling(engine, batch_size=2, max_head_lag=2, drain_s=10_000.0) as executor:
        one.do(wait={"running": 6})
        executor.publish(weights(1.0), 1)  # would be cut by the test's own deadline
        one.do(held=False)
        batch = executor.take()
        assert batch is not None
        assert_exact(list(batch), 4)
        executor.pause()


@pytest.mark.parametrize("version", [0, 3, 5])
def test_versions_advance_by_one(one: Server, version: int):
    with connected(one) as engine:
        publish(engine, 3, reset=True)
        with pytest.raises(VersionError, match=f"at version 3; cannot commit {version}"):
            engine.update_weights([], version)
        publish(engine, 4)


def test_a_step_that_was_skipped_moves_the_label_alone(one: Server):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        engine.pause()
        report = engine.update_weights([], 1)
        engine.resume()
        assert report.num_bytes == 0 and report.version == 1
    state = one.do()
    assert state["version"] == "1" and len(state["loads"]) == 1


def test_connecting_resumes_a_server_found_paused_at_another_version(one: Server):
    urlopen_pause(one)
    with connected(one) as engine:
        assert not one.do()["paused"]
        publish(engine, 7, reset=True)
        assert [s.version for s in generate(engine, request())] == [7]


def test_weights_are_loaded_whole_and_then_in_part(one: Server):
    with connected(one) as engine:
        engine.pause()
        report = engine.update_weights(weights(1.0, "a", "b", "c"), 0, reset=True)
        assert report.num_bytes == 3 * 2 * 4 and report.bytes_per_s > 0
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
    state = one.do()
    assert state["loads"] == [["a", "b", "c"], ["b"]]
    assert state["weights"] == {"a": 1.0, "b": 2.0, "c": 1.0}
