"""Streamed answers: the same as whole ones, and what a lost server had sent is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import SamplingParams, Segment, TrajectoryGroup
from support.fake_servers import (
    GENERATE,
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import Sending, assert_exact, generate, publish, publish_thrice, request
from support.rollouts import Samples, rolling

CHUNKED = 17  # tokens that have come after two chunks: the first, and sixteen


def stamps(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(segment.version, len(segment)) for segment in segments]


def lengths(groups: list[TrajectoryGroup]) -> list[list[tuple[int, int]]]:
    """Version and length of each segment of each group, which has one trajectory."""
    parts = [group.trajectories[0].segments for group in groups]
    return [stamps(list(segments)) for segments in parts]


# As whole answers ---------------------------------------------------------------------------------


def sampled(one: Server, mode: str, *, stream: bool) -> list[tuple[Any, ...]]:
    """Eight requests under three publishes: version, tokens and log-probs of every segment."""
    one.do(reset={})
    engine = make_engine(one, on_update=mode, stream=stream)
    groups = publish_thrice(engine, one, budget=50, step=9)
    assert {body.get("stream", False) for body in one.do()["seen"]} == {stream}
    return [
        (s.version, tuple(s.token_ids.tolist()), tuple(s.logprobs.tolist()))
        for group in groups
        for s in group.trajectories[0].segments
    ]


@pytest.mark.parametrize("mode", ["interrupt", "keep"])
def test_a_stream_is_the_same_as_a_whole_answer_under_three_publishes(one: Server, mode: str):
    whole, streamed = sampled(one, mode, stream=False), sampled(one, mode, stream=True)
    assert streamed == whole
    assert [(version, len(tokens)) for version, tokens, _ in whole] == (
        [(0, 9), (1, 9), (2, 9), (3, 23)] * 8
    )


def test_a_pause_in_the_middle_of_a_stream_returns_every_token(one: Server):
    one.do(held=True)
    with connected(one, stream=True) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request(budget=40)])
        one.do(wait={"running": 1})
        one.do(step=20, wait={"streamed": CHUNKED})
        engine.pause()
        assert sending.join() == ["abort"]
    assert [stamps(got) for got in sending.segments] == [[(0, 20)]]


def test_a_pause_before_the_first_token_of_a_stream_returns_none(one: Server):
    one.do(held=True)
    with connected(one, stream=True) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request(budget=40)])
        one.do(wait={"running": 1})
        engine.pause()
        assert sending.join() == ["abort"] and sending.segments == [[]]


# What breaks off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "unfinished", "error"])
@pytest.mark.fault("corrupted data", "generate")
def test_a_stream_that_breaks_off_is_an_interruption_that_keeps_what_came(one: Server, kind: str):
    with connected(one, stream=True, health_interval_s=1000.0) as engine:
        publish(engine, 5, reset=True)
        one.fault(GENERATE, kind, after=2, times=1)
        sending = Sending(engine, [request(budget=40)])
        assert sending.join() == ["abort"]
        assert [stamps(got) for got in sending.segments] == [[(5, CHUNKED)]]
        assert engine.num_generated == CHUNKED
        assert engine.num_serving == 0


@pytest.mark.parametrize("kind", ["cut", "unfinished", "error", "500", "odd", "garbage"])
def test_a_stream_without_one_token_is_sent_again(one: Server, kind: str):
    with connected(one, stream=True) as engine:
        publish(engine, 0, reset=True)
        one.fault(GENERATE, kind, times=1)
        assert stamps(generate(engine, request(budget=40))) == [(0, 40)]
        assert len(one.do()["seen"]) == (2 if kind in ("cut", "unfinished", "error") else 1)


@pytest.mark.fault("corrupted data", "generate")
def test_a_stream_that_ends_with_an_impossible_version_is_not_believed(one: Server):
    with connected(one, stream=True, health_interval_s=1000.0, recover_s=0.5) as engine:
        publish(engine, 5, reset=True)
        one.do(reset={})  # it was restarted
        sending = Sending(engine, [request(budget=40)])
        [result] = sending.join()
        assert engine.num_serving == 0 and sending.segments == [[]]
        assert isinstance(result, EngineError)
        assert "under version 'default' and not under 5 to 5" in str(result)


def test_a_refusal_in_a_stream_costs_no_server(one: Server):
    with connected(one, stream=True) as engine:
        publish(engine, 0, reset=True)
        wrong = GenerationRequest(np.array([699]), SamplingParams(max_new_tokens=1))
        with pytest.raises(EngineError, match="Token id 699 is out of vocabulary"):
            generate(engine, wrong)
        assert engine.num_serving == 1
        assert one.do()["received"][GENERATE] == 2 + 1  # two probes; nothing is sent twice


@pytest.mark.parametrize("mode", ["interrupt", "keep"])
@pytest.mark.fault("process killed", "generate")
def test_a_server_killed_in_its_streams_takes_with_it_only_what_it_had_not_sent(mode: str):
    with servers(2, "--held") as [well, ill]:
        engine = make_engine(well, ill, stream=True, on_update=mode)
        engine.start()
        workflow = Samples(max_new_tokens=40)
        with rolling(
            engine, workflow, version=2, batch_size=8, max_head_lag=0, rows=8, num_epochs=1
        ) as executor:
            for server in (well, ill):
                server.do(wait={"running": 4})
                server.do(step=20, wait={"streamed": 4 * CHUNKED})
            ill.kill()
            well.do(wait={"running": 8})  # those of the other one have come
            well.do(held=False)
            batch = executor.take()
            assert batch is not None
            groups = list(batch)
            assert_exact(groups, 40)
            assert (
                sorted(lengths(groups)) == [[(2, CHUNKED), (2, 40 - CHUNKED)]] * 4 + [[(2, 40)]] * 4
            )
            resent = [body for body in well.do()["seen"] if len(body["token_ids"]) > 2]
            assert [len(body["token_ids"]) for body in resent] == [2 + CHUNKED] * 4
            assert engine.num_generated == 8 * 40
    assert_nothing_left()


@pytest.mark.fault("process killed", "generate")
def test_tokens_of_a_lost_stream_are_not_kept_once_the_version_has_changed():
    """Some are of the old version and some of the new one, and only the last chunk says which."""
    with servers(2, "--held") as [well, ill]:
        engine = make_engine(well, ill, stream=True, on_update="keep")
        engine.start()
        workflow = Samples(max_new_tokens=60)
        with rolling(
            engine, workflow, batch_size=8, max_head_lag=1, rows=8, num_epochs=1
        ) as executor:
            for server in (well, ill):
                server.do(wait={"running": 4})
                server.do(step=20, wait={"streamed": 4 * CHUNKED})
            executor.publish(weights(1.0), 1)
            ill.do(step=20, wait={"streamed": 4 * (CHUNKED + 16)})
            ill.kill()
            well.do(wait={"running": 8})
            well.do(held=False)
            batch = executor.take()
            assert batch is not None
            groups = list(batch)
            assert_exact(groups, 60)
            assert sorted(lengths(groups)) == [[(0, 20), (1, 40)]] * 4 + [[(1, 60)]] * 4
            assert engine.num_generated == 8 * 60
    assert_nothing_left()
