"""The engine of servers: routing, refused requests and settings, closing."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import SamplingParams
from support.fake_servers import (
    GENERATE,
    Server,
    assert_nothing_left,
    connected,
    make_engine,
    servers,
    weights,
)
from support.remote_engines import Sending, assert_exact, generate, publish, request
from support.rollouts import Samples, assert_conserved, rolling, wait_until

# Routing ------------------------------------------------------------------------------------------


def test_groups_stay_on_their_server_and_others_go_where_least_is_out(two: list[Server]):
    for server in two:
        server.do(held=True)
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        grouped = [request(tokens=9, key="g") for _ in range(4)]
        first = Sending(engine, grouped)
        home = wait_for_home(two, 4)
        away = next(server for server in two if server is not home)
        second = Sending(engine, [request(key=f"k{n}") for n in range(4)])
        away.wait(running=4)
        for server in two:
            server.do(held=False)
        assert first.join() == second.join() == ["length"] * 4
        assert engine.num_serving == 2


def wait_for_home(two: list[Server], count: int) -> Server:
    while True:
        for server in two:
            if server.do()["running"] == count:
                return server


def test_no_more_than_max_requests_are_out(one: Server):
    one.do(held=True)
    with connected(one, max_requests=2) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request() for _ in range(5)])
        one.wait(running=2)
        assert one.do()["received"][GENERATE] == 2 + 2  # and two probes
        one.do(held=False)
        assert sending.join() == ["length"] * 5


def test_requests_that_follow_one_another_share_a_connection(one: Server):
    with connected(one, health_interval_s=1000.0) as engine:
        publish(engine, 0, reset=True)
        for _ in range(24):
            generate(engine, request())
        assert one.do()["connections"] < 12  # 1 where nothing stands still for seconds


def test_groups_of_a_long_run_are_forgotten(one: Server):
    from sdp_lightning.engines.remote import replicas

    async def many() -> int:
        chosen = replicas.ReplicaSet([one.url])
        chosen.bring_in(chosen.replicas[0])
        for number in range(replicas._REMEMBERED_GROUPS + 10):
            await chosen.choose(str(number), 1.0)
        return len(chosen._home)

    assert asyncio.run(many()) == replicas._REMEMBERED_GROUPS


# Refusals -----------------------------------------------------------------------------------------


def test_a_request_longer_than_the_server_allows_is_refused(one: Server):
    one.do(reset={"max_length": 8})
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="3 tokens and max_new_tokens=6 do not fit the 8"):
            generate(engine, request(tokens=3, budget=6))
        assert [len(s) for s in generate(engine, request(tokens=3, budget=5))] == [5]


def test_a_request_that_the_server_refuses_costs_no_server(one: Server):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        wrong = GenerationRequest(np.array([699]), SamplingParams(max_new_tokens=1))
        with pytest.raises(EngineError, match="Token id 699 is out of vocabulary"):
            generate(engine, wrong)
        assert engine.num_serving == 1


def test_raw_logprobs_are_refused_with_the_flag_to_use(one: Server):
    one.do(reset={"raw_logprobs": True})
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        make_engine(one).start()
    assert_nothing_left()


def test_a_key_opens_a_server_that_wants_one():
    with servers(1, "--api-key", "secret") as [server]:
        with connected(server, api_key="secret") as engine:
            publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="answered 401"):
            make_engine(server).start()
    assert_nothing_left()


def test_fewer_servers_than_min_replicas_are_refused():
    with pytest.raises(ConfigError, match="1 servers are fewer than min_replicas=2"):
        RemoteInfEngine(
            ["http://127.0.0.1:1"], VLLMBackend(), options=RemoteOptions(min_replicas=2)
        )


@pytest.mark.parametrize(
    "options",
    [
        {"on_update": "maybe"},
        {"min_replicas": 0},
        {"max_tries": 0},
        {"max_requests": 0},
        {"settle_s": -1.0},
        {"recover_s": 0.0},
        {"health_timeout_s": -2.0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        RemoteOptions(**options)


# Closing ------------------------------------------------------------------------------------------


def test_closing_fails_what_is_out_and_leaves_nothing(one: Server):
    one.do(held=True)
    before = set(os.listdir("/proc/self/fd"))
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [request(), request()])
        one.wait(running=2)
        engine.close()
        results = sending.join()
        assert all(isinstance(r, EngineError) and "closed" in str(r) for r in results)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            generate(engine, request())
        with pytest.raises(EngineError, match="closed"):
            engine.pause()
    assert_nothing_left()
    one.wait(running=0)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_an_engine_that_never_started_says_so():
    engine = RemoteInfEngine(["http://127.0.0.1:1"], VLLMBackend())
    with pytest.raises(EngineError, match="has not started"):
        engine.pause()
    with pytest.raises(EngineError, match="has not started"):
        engine.update_weights([], 0, reset=True)
    engine.close()


def test_a_start_that_fails_leaves_nothing_and_may_not_be_mistaken_for_one(one: Server):
    one.fault("/v1/models", "500")
    engine = make_engine(one)
    with pytest.raises(EngineError, match=r"cannot use the vllm server at .*/v1/models"):
        engine.start()
    assert_nothing_left()
    with pytest.raises(EngineError, match="closed"):
        engine.pause()


def test_starting_twice_is_starting_once(one: Server):
    with connected(one) as engine:
        engine.start()
        assert one.do()["received"]["/v1/models"] == 1


def test_a_cancelled_request_leaves_the_server(one: Server):
    one.do(held=True)
    with connected(one) as engine:
        publish(engine, 0, reset=True)

        async def give_up() -> None:
            task = asyncio.create_task(engine.generate(request(), lambda segment: None))
            await asyncio.to_thread(one.wait, running=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(give_up())
        one.wait(running=0)
        assert engine.num_serving == 1


def test_the_ledger_is_conserved_while_groups_are_dropped(one: Server):
    engine = make_engine(one)
    engine.start()
    with rolling(engine, Samples(group_size=2), batch_size=4, max_head_lag=0) as executor:
        for version in range(1, 6):
            batch = executor.take()
            assert batch is not None
            assert_exact(list(batch), 4)
            assert {s.version for g in batch for s in g.segments} == {version - 1}
            executor.publish(weights(float(version)), version)
            assert_conserved(executor)
        wait_until(executor, lambda: executor.stat.consumed == 20)
        executor.pause()
