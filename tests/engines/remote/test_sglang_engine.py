"""The engine on fake SGLang processes: exact versions, refusals, and a fit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import sdp_lightning as sdp
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import SamplingParams
from support.fake_servers import assert_nothing_left, connected, make_engine, servers, weights
from support.remote_engines import Sending, generate, publish, publish_thrice, request
from support.sglang_engines import SGLangServer, pair
from support.trainers import Recorder, make_data, make_module, make_trainer, make_workflow

__all__ = ["pair"]  # the fixture on which "one" and "two" rest

# Versions -----------------------------------------------------------------------------------------


def test_a_request_comes_back_with_the_version_that_sampled_it(one: SGLangServer):
    with connected(one) as engine:
        publish(engine, 3, reset=True)
        [segment] = generate(engine, request(tokens=3, budget=4))
        assert segment.version == 3 and segment.token_ids.tolist() == [6, 7, 8, 9]
        assert segment.logprobs.tolist() == pytest.approx([-0.4] * 4)
        assert segment.kv_on_update == "recompute" and one.do()["clear_cache"] == "true"
        assert engine.num_generated == 4 and engine.version == 3


def test_three_publishes_under_eight_requests_lose_and_double_nothing(one: SGLangServer):
    groups = publish_thrice(make_engine(one), one, budget=16, step=4)
    stamped = [[(s.version, len(s)) for s in g.trajectories[0].segments] for g in groups]
    assert stamped == [[(0, 4), (1, 4), (2, 4), (3, 4)]] * 8
    prompts = Counter(tuple(body["input_ids"]) for body in one.do()["seen"])
    assert prompts[(1, 2)] >= 8
    assert prompts[(1, 2, 5, 6, 7, 8)] == 8  # each is sent again with what it had


def test_keep_is_refused_when_the_engine_starts(one: SGLangServer):
    with pytest.raises(
        ConfigError, match=r"does not report which version .* on_update='interrupt'"
    ):
        make_engine(one, on_update="keep").start()
    assert_nothing_left()


def test_a_cache_kept_across_updates_is_refused_before_any_weights_are_sent(one: SGLangServer):
    refused = pytest.raises(ConfigError, match="every load clears the caches")
    with connected(one, kv_on_update="keep") as engine, refused:
        engine.pause()
    assert one.do()["loads"] == []


def test_weights_are_loaded_whole_and_then_in_part(one: SGLangServer):
    with connected(one) as engine:
        engine.pause()
        engine.update_weights(weights(1.0, "a", "b", "c"), 0, reset=True)
        engine.update_weights(weights(2.0, "b"), 1)
        engine.resume()
    state = one.do()
    assert state["loads"] == [["a", "b", "c"], ["b"]]
    assert state["weights"] == {"a": 1.0, "b": 2.0, "c": 1.0}


def test_connecting_resumes_a_server_found_paused_at_another_version(one: SGLangServer):
    one.post("/update_weight_version", {"new_version": "12"})
    one.post("/pause_generation", {"mode": "abort"})
    with connected(one, health_timeout_s=5.0) as engine:
        assert not one.do()["paused"]
        publish(engine, 7, reset=True)
        assert [s.version for s in generate(engine, request())] == [7]


def test_an_echo_is_of_the_weights_that_sample(one: SGLangServer):
    with connected(one) as engine:
        publish(engine, 4, reset=True)
        found = engine.prompt_logprobs(np.array([3, 4, 5]))
        assert list(found) == [one.url]
        assert found[one.url].tolist() == pytest.approx([-0.5, -0.5])
        assert engine.num_generated == 0


# Sampling -----------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_completion(one: SGLangServer):
    stopping = GenerationRequest(
        np.arange(3), SamplingParams(max_new_tokens=6, stop_token_ids=(8,))
    )
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        sending = Sending(engine, [stopping])
        assert sending.join() == ["stop"]
        assert [s.token_ids.tolist() for s in sending.segments[0]] == [[6, 7, 8]]


def test_truncated_sampling_is_an_error_of_the_request_and_costs_no_server(one: SGLangServer):
    params = SamplingParams(max_new_tokens=2, top_p=0.9, allow_truncated_sampling=True)
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match=r"top_p=0\.9"):
            generate(engine, GenerationRequest(np.arange(3), params))
        assert engine.num_serving == 1 and one.do()["seen"] == []


def test_logprobs_without_the_temperature_are_refused_with_what_to_change(one: SGLangServer):
    one.do(reset={"raw_logprobs": True})
    with pytest.raises(EngineError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        make_engine(one).start()
    assert_nothing_left()


def test_a_request_that_the_server_refuses_costs_no_server(one: SGLangServer):
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="hold 699, outside of the vocabulary"):
            generate(engine, GenerationRequest(np.array([699]), SamplingParams(max_new_tokens=1)))
        assert engine.num_serving == 1


def test_a_request_longer_than_the_server_allows_is_refused(one: SGLangServer):
    one.do(reset={"max_length": 8})
    with connected(one) as engine:
        publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="3 tokens and max_new_tokens=6 do not fit the 8"):
            generate(engine, request(tokens=3, budget=6))


def test_a_key_opens_a_server_that_wants_one():
    with servers(1, "--api-key", "secret", kind=SGLangServer) as [server]:
        with connected(server, api_key="secret") as engine:
            publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="answered 401"):
            make_engine(server).start()
    assert_nothing_left()


@pytest.mark.fault("process killed", "generate")
def test_what_a_stream_had_when_its_server_died_is_kept():
    with (
        servers(2, "--held", "--incremental", kind=SGLangServer) as [well, ill],
        connected(well, ill, stream=True) as engine,
    ):
        publish(engine, 2, reset=True)
        sending = Sending(engine, [request(budget=5, key=str(n)) for n in range(2)])
        for server in (well, ill):
            server.wait(running=1)
            server.do(step=2, wait={"stalled": True})
        well.do(held=False)
        ill.do(wait={"streamed": 2})
        ill.kill()
        assert sorted(sending.join()) == ["abort", "length"]
        tokens = [[t for s in got for t in s.token_ids.tolist()] for got in sending.segments]
        assert sorted(tokens) == [[6, 7], [6, 7, 8, 9, 3]]
        assert {s.version for got in sending.segments for s in got} == {2}


@pytest.mark.fault("corrupted data", "generate")
def test_a_server_that_streams_all_tokens_again_and_again_is_refused(one: SGLangServer):
    with connected(one, stream=True) as engine:
        publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="--incremental-streaming-output"):
            generate(engine, request())
        assert one.do()["seen"] == []


# The public face ----------------------------------------------------------------------------------


def test_a_url_names_servers_that_run():
    engine = connect_engine("sglang://localhost:1,[::1]:2/", model="some/model", max_tries=3)
    assert isinstance(engine, RemoteInfEngine) and engine.options.max_tries == 3
    assert engine.version is None and not engine.updates_in_flight


@pytest.mark.parametrize("rest", ["", "h:x", "launch?replicas=2", "h?x:8"])
def test_a_url_that_names_no_server_says_how_to(rest: str):
    with pytest.raises(ConfigError, match=r"does not name servers\. Write 'sglang://host:port"):
        connect_engine(f"sglang://{rest}", api_key="k")


def test_servers_on_other_hosts_need_a_key():
    with pytest.raises(ConfigError, match="far:8000 is on another host"):
        connect_engine("sglang://far:8000")


def test_a_fit_trains_through_two_servers(model_folder: str):
    recorder = Recorder()
    with servers(2, kind=SGLangServer) as running:
        url = "sglang://" + ",".join(server.host for server in running)
        data = make_data(make_workflow(max_new_tokens=5), engine=url, max_head_lag=0)
        sync = sdp.WeightSyncCallback(weight_check_every=0)  # fake servers have no model
        trainer = make_trainer(sync, recorder, max_steps=3)
        trainer.fit(make_module(model_folder), data)
        assert recorder.engine_versions == [0, 1, 2, 3]
        assert [set(lags) for lags in recorder.lags] == [{0}] * 3
        for server in running:
            state = server.do()
            assert state["version"] == "3" and len(state["loads"]) == 4 and state["seen"]
            assert state["weights"]
            for name, value in state["weights"].items():
                expected = recorder.weights[3][name].flatten()[0].item()
                assert value == pytest.approx(expected, rel=1e-6), name
    assert_nothing_left()
