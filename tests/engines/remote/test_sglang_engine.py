"""The engine on fake SGLang processes: exact versions, faults, lost servers, and a fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import sdp_lightning as sdp
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.sglang import SGLangBackend
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import SamplingParams
from support.fake_servers import QUICK, Server, assert_nothing_left, weights
from support.paths import SUPPORT
from support.remote_engines import Sending, assert_exact, generate, publish, request
from support.rollouts import Samples, rolling
from support.trainers import Recorder, make_data, make_module, make_trainer, make_workflow

GENERATE = "/generate"
SHORT: dict[str, Any] = {
    "health_timeout_s": 1.0,
    "answer_timeout_s": 1.0,
    "control_timeout_s": 1.0,
    "request_timeout_s": 1.0,
}


class SGLangServer(Server):
    """A fake SGLang in a process of its own."""

    def start(self) -> None:
        script = SUPPORT / "fake_sglang.py"
        command = [sys.executable, str(script), "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line and line[0] == "ready", "the fake server did not start"
        self.port = int(line[1])

    def post(self, path: str, body: Any) -> Any:
        """As another client would."""
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), method="POST")
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=30.0) as answer:
            return json.loads(answer.read())


@contextmanager
def servers(count: int, *arguments: str) -> Iterator[list[SGLangServer]]:
    running = [SGLangServer(*arguments) for _ in range(count)]
    try:
        yield running
    finally:
        for server in running:
            server.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[SGLangServer]]:
    with servers(2) as running:
        yield running


@pytest.fixture
def two(pair: list[SGLangServer]) -> list[SGLangServer]:
    for server in pair:
        server.do(reset={}, faults=[])
    return pair


@pytest.fixture
def one(two: list[SGLangServer]) -> SGLangServer:
    return two[0]


def make_engine(*running: Server, **options: Any) -> RemoteInfEngine:
    settings = RemoteOptions(**(QUICK | options))
    return RemoteInfEngine([server.url for server in running], SGLangBackend(), options=settings)


@contextmanager
def connected(*running: Server, **options: Any) -> Iterator[RemoteInfEngine]:
    """A started engine; closed at the end, and nothing of it is left."""
    engine = make_engine(*running, **options)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
    assert_nothing_left()


def await_serving(engine: RemoteInfEngine, server: Server, count: int) -> None:
    """Wait until ``count`` servers serve; ``server`` is asked meanwhile, so nothing spins."""
    deadline = time.monotonic() + 100.0
    while time.monotonic() < deadline:
        if engine.num_serving == count:
            return
        server.do()
    raise AssertionError(f"{engine.num_serving} servers serve")


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
    one.do(held=True)
    engine = make_engine(one)
    engine.start()
    workflow = Samples(max_new_tokens=16)
    with rolling(engine, workflow, batch_size=8, max_head_lag=4, max_concurrent=8) as executor:
        for version in (1, 2, 3):
            one.do(wait={"running": 8})
            one.do(step=4, wait={"stalled": True})
            executor.publish(weights(float(version)), version)
        one.do(held=False)
        batch = executor.take()
        assert batch is not None
        groups = list(batch)
        assert_exact(groups, 16)
        stamped = [[s.version for s in g.trajectories[0].segments] for g in groups]
        assert stamped == [[0, 1, 2, 3]] * 8
        assert [len(s) for s in groups[0].trajectories[0].segments] == [4, 4, 4, 4]
        executor.pause()
    assert_nothing_left()
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
    with servers(1, "--api-key", "secret") as [server]:
        with connected(server, api_key="secret") as engine:
            publish(engine, 0, reset=True)
        with pytest.raises(EngineError, match="answered 401"):
            make_engine(server).start()
    assert_nothing_left()


@pytest.mark.fault("process killed", "generate")
def test_what_a_stream_had_when_its_server_died_is_kept():
    with (
        servers(2, "--held", "--incremental") as [well, ill],
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


# Faults -------------------------------------------------------------------------------------------

KINDS = ["500", "hang", "disconnect", "garbage", "odd", "truncated"]
CONNECT = ["/server_info", "/model_info", GENERATE, "/continue_generation"]
PHASES = {
    "pause": "/pause_generation",
    "load": "/update_weights_from_disk",
    "set version": "/update_weight_version",
    "verify": "/model_info",
    "resume": "/continue_generation",
}
SPECIAL = [("load", "load"), ("set version", "ignored"), ("verify", "wrong")]


def limits(kind: str, *, recover_s: float = 1.0) -> dict[str, Any]:
    """Deadlines that are short only where one is to pass, so that a slow machine passes none."""
    return (SHORT if kind == "hang" else {}) | {"recover_s": recover_s, "max_tries": 3}


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
        await_serving(engine, well, 2)
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
@pytest.mark.fault("corrupted data", "generate", only="^(garbage|odd|bytes|truncated)$")
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
    with servers(2, "--held") as [well, ill], connected(well, ill) as engine:
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
        await_serving(engine, well, 2)
        assert ill.do()["version"] == "0" and ill.do()["weights"] == {"a": 0.0, "b": 0.0}


# The public face ----------------------------------------------------------------------------------


def test_a_url_names_servers_that_run():
    engine = connect_engine("sglang://localhost:1,[::1]:2/", model="some/model", max_tries=3)
    assert isinstance(engine, RemoteInfEngine) and engine.options.max_tries == 3
    assert engine.version is None and not engine.updates_in_flight


@pytest.mark.parametrize("rest", ["", "localhost", "h:x", "launch?replicas=2", "h?x:8"])
def test_a_url_that_names_no_server_says_how_to(rest: str):
    with pytest.raises(ConfigError, match=r"does not name servers\. Write 'sglang://host:port"):
        connect_engine(f"sglang://{rest}", api_key="k")


def test_servers_on_other_hosts_need_a_key():
    with pytest.raises(ConfigError, match="far:8000 is on another host"):
        connect_engine("sglang://far:8000")


def test_a_fit_trains_through_two_servers(model_folder: str):
    recorder = Recorder()
    with servers(2) as running:
        url = "sglang://" + ",".join(server.host for server in running)
        data = make_data(make_workflow(max_new_tokens=5), engine=url, max_head_lag=0)
        trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=3)
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
