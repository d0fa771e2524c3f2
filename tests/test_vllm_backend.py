"""vLLM's wire format, held to answers recorded from vLLM 0.32.0."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.backend import Call, RemoteInfBackend, ServerInfo, Span
from sdp_lightning.engines.base import GenerationRequest
from sdp_lightning.engines.vllm import VLLMBackend
from sdp_lightning.errors import EngineError
from sdp_lightning.types import SamplingParams

BACKEND: RemoteInfBackend = VLLMBackend()
INFO = ServerInfo(model="m", max_length=256)
MODELS = {
    "object": "list",
    "data": [
        {
            "id": "m",
            "object": "model",
            "created": 1795396941,
            "owned_by": "vllm",
            "root": "/tmp/tinyvllm",
            "parent": None,
            "max_model_len": 256,
        }
    ],
}


def recorded_token(token: int, logprob: float) -> dict[str, Any]:
    top = {"token_id": token, "logprob": logprob, "rank": 1}
    return top | {"top_logprobs": [top]}


COMPLETION: dict[str, Any] = {
    "request_id": "generate-tokens-85",
    "model": "m",
    "created": 1795397237,
    "usage": {"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4},
    "output_mode": "tokens",
    "choices": [
        {
            "index": 0,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [14, 31, 50, 59],
            "weight_versions": [{"version": "default", "start": 0, "end": 4}],
            "logprobs": {
                "content": [
                    recorded_token(14, -0.657286524772644),
                    recorded_token(31, -1.5),
                    recorded_token(50, -2.25),
                    recorded_token(59, -0.125),
                ]
            },
        }
    ],
}


def completion(**changes: Any) -> dict[str, Any]:
    answer = copy.deepcopy(COMPLETION)
    answer["choices"][0] |= changes
    return answer


def span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def test_a_recorded_completion_is_one_span():
    read = BACKEND.read_completion(COMPLETION)
    assert read.finish_reason == "length"
    logprobs = (-0.657286524772644, -1.5, -2.25, -0.125)
    assert read.spans == (Span("default", (14, 31, 50, 59), logprobs),)


def test_spans_divide_the_tokens_and_empty_ones_are_left_out():
    spans = [span("1", 0, 3), span("2", 3, 3), span("3", 3, 4)]
    read = BACKEND.read_completion(completion(weight_versions=spans, finish_reason="abort"))
    assert [(s.version, s.token_ids) for s in read.spans] == [("1", (14, 31, 50)), ("3", (59,))]
    assert read.finish_reason == "abort"


@pytest.mark.parametrize("empty", [None, []])
def test_an_interruption_before_the_first_token_has_no_span(empty: Any):
    nothing = {"token_ids": empty, "weight_versions": empty, "logprobs": None}
    read = BACKEND.read_completion(completion(**nothing, finish_reason="abort"))
    assert read.spans == () and read.finish_reason == "abort"


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [span("1", 0, 3)],
        [span("1", 0, 5)],
        [span("1", 1, 4)],
        [span("1", 0, 2), span("2", 3, 4)],
        [span("1", 0, 3), span("2", 2, 4)],
        [span("1", 0, 5), span("2", 5, 4)],
    ],
)
def test_spans_that_do_not_cover_every_token_once_are_refused(spans: Any):
    with pytest.raises(EngineError, match="they must agree"):
        BACKEND.read_completion(completion(weight_versions=spans))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "text",
        {},
        {"choices": []},
        completion(finish_reason="error"),
        completion(finish_reason=None),
        completion(token_ids=["x", 1, 2, 3]),
        completion(logprobs={"content": [{"token_id": 1}] * 4}),
        completion(weight_versions=[{"version": "1"}]),
        completion(weight_versions=[span("1", 0, float("inf"))]),  # type: ignore[arg-type]
        {"choices": [{k: v for k, v in COMPLETION["choices"][0].items() if k[0] != "w"}]},
    ],
)
def test_another_form_is_an_error_that_says_what_was_wanted(answer: Any):
    with pytest.raises(EngineError, match=r"weight_versions \(vLLM 0.32\)"):
        BACKEND.read_completion(answer)


def test_tokens_without_logprobs_are_refused():
    with pytest.raises(EngineError, match="4 tokens, 0 log-probs"):
        BACKEND.read_completion(completion(logprobs=None))


def test_a_request_asks_for_all_that_the_episode_needs():
    params = SamplingParams(max_new_tokens=4, temperature=0.7, stop_token_ids=(2, 3))
    request = GenerationRequest(np.array([4, 5, 6]), params, seed=10)
    call = BACKEND.generate(request, INFO)
    assert (call.method, call.path) == ("POST", "/inference/v1/generate")
    assert call.body == {
        "model": "m",
        "token_ids": [4, 5, 6],
        "sampling_params": {
            "max_tokens": 4,
            "temperature": 0.7,
            "top_p": 1.0,
            "logprobs": 0,
            "seed": 13,
            "stop_token_ids": [2, 3],
            "ignore_eos": True,
        },
    }


def test_top_k_is_sent_where_it_is_set_and_seeds_stay_in_range():
    params = SamplingParams(max_new_tokens=1, top_k=5, allow_truncated_sampling=True)
    request = GenerationRequest(np.array([4]), params, seed=2**63 - 1)
    body = BACKEND.generate(request, INFO).body
    assert body is not None and body["sampling_params"]["top_k"] == 5
    assert body["sampling_params"]["seed"] == 0


def test_what_a_server_says_of_itself():
    assert BACKEND.name == "vllm"
    assert BACKEND.describe() == Call("GET", "/v1/models")
    assert BACKEND.read_description(MODELS) == INFO
    for odd in (None, [], {"data": []}, {"data": [{"id": "m", "max_model_len": "long"}]}):
        with pytest.raises(EngineError, match="/v1/models without data"):
            BACKEND.read_description(odd)


def test_versions_are_set_asked_and_read():
    call = BACKEND.set_version(1)
    assert call == Call("POST", "/update_weight_version", {"new_version": "1"})
    assert BACKEND.get_version() == Call("GET", "/weight_info")
    assert BACKEND.read_version({"weight_version": "default"}) == "default"
    for odd in (None, "x", {}, [1]):
        with pytest.raises(EngineError, match="/weight_info without weight_version"):
            BACKEND.read_version(odd)


def test_control_routes():
    assert BACKEND.health() == Call("GET", "/health")
    assert BACKEND.resume() == Call("POST", "/resume")
    paused = BACKEND.pause("interrupt", "recompute")
    assert paused == Call("POST", "/pause?mode=abort&clear_cache=true")
    assert BACKEND.pause("keep", "keep") == Call("POST", "/pause?mode=keep&clear_cache=false")
    body = {"method": "sdp_load_folder", "kwargs": {"folder": "/f"}}
    assert BACKEND.load_folder("/f") == Call("POST", "/collective_rpc", body)


@pytest.mark.parametrize(
    ("call", "answer", "odd"),
    [
        (BACKEND.pause("interrupt", "keep"), {"status": "paused"}, {"status": "resumed"}),
        (BACKEND.pause("keep", "recompute"), {"status": "paused"}, None),
        (BACKEND.resume(), {"status": "resumed"}, {"status": "paused"}),
        (BACKEND.resume(), {"status": "resumed"}, {}),
        (BACKEND.load_folder("/f"), {"results": [None]}, {"results": []}),
        (BACKEND.load_folder("/f"), {"results": [None]}, [1]),
        (BACKEND.set_version(1), {"success": True, "new_version": "1"}, {"success": False}),
    ],
)
def test_what_was_told_is_done_when_the_answer_says_so(call: Call, answer: Any, odd: Any):
    BACKEND.read_done(call, answer)
    with pytest.raises(EngineError, match=f"vLLM answered {call.path.partition('?')[0]} without"):
        BACKEND.read_done(call, odd)


def probed(*logprobs: float) -> dict[str, Any]:
    top = [{"token_id": n, "logprob": v, "rank": n + 1} for n, v in enumerate(logprobs)]
    return {"choices": [{"logprobs": {"content": [{"token_id": 0, "top_logprobs": top}]}}]}


def test_a_probe_asks_for_one_token_at_its_temperature():
    body = BACKEND.probe(INFO, 0.5).body
    assert body is not None
    sampling = body["sampling_params"]
    assert (sampling["max_tokens"], sampling["temperature"]) == (1, 0.5)


def test_logprobs_that_follow_the_temperature_pass_and_others_name_the_flag():
    BACKEND.read_probe(probed(-1.0, -2.0), probed(-0.5, -3.0))
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        BACKEND.read_probe(probed(-1.0, -2.0), probed(-1.0, -2.0))
    with pytest.raises(EngineError, match="top_logprobs"):
        BACKEND.read_probe({"choices": []}, probed(-1.0))
