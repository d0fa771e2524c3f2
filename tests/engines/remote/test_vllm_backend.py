"""vLLM's wire format, held to answers recorded from vLLM 0.32.0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import (
    Call,
    Span,
)
from sdp_lightning.errors import EngineError
from sdp_lightning.types import SamplingParams
from sdp_lightning.weights.protocol import (
    EngineTransfer,
    Instruction,
    LoadAdapter,
    LoadFolder,
    Receive,
)
from support.vllm_answers import BACKEND, COMPLETION, INFO, completion, probed, span

HELLO = {"results": [True]}


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


def test_a_recorded_completion_is_one_span():
    read = BACKEND.read_completion(COMPLETION, INFO, 0)
    assert read.finish_reason == "length"
    logprobs = (-0.657286524772644, -1.5, -2.25, -0.125)
    assert read.spans == (Span("default", (14, 31, 50, 59), logprobs),)


def test_spans_divide_the_tokens_and_empty_ones_are_left_out():
    spans = [span("1", 0, 3), span("2", 3, 3), span("3", 3, 4)]
    read = BACKEND.read_completion(
        completion(weight_versions=spans, finish_reason="abort"), INFO, 0
    )
    assert [(s.version, s.token_ids) for s in read.spans] == [("1", (14, 31, 50)), ("3", (59,))]
    assert read.finish_reason == "abort"


@pytest.mark.parametrize("empty", [None, []])
def test_an_interruption_before_the_first_token_has_no_span(empty: Any):
    nothing = {"token_ids": empty, "weight_versions": empty, "logprobs": None}
    read = BACKEND.read_completion(completion(**nothing, finish_reason="abort"), INFO, 0)
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
    with pytest.raises(EngineError, match=r"they must agree|without weight_versions"):
        BACKEND.read_completion(completion(weight_versions=spans), INFO, 0)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "text",
        {},
        {"choices": []},
        completion(finish_reason="error"),
        completion(token_ids=["x", 1, 2, 3]),
        completion(logprobs={"content": [{"token_id": 1}] * 4}),
        completion(weight_versions=[{"version": "1"}]),
        completion(weight_versions=[span("1", 0, float("inf"))]),  # type: ignore[arg-type]
        {"choices": [{k: v for k, v in COMPLETION["choices"][0].items() if k[0] != "w"}]},
    ],
)
def test_another_form_is_an_error_that_says_what_was_wanted(answer: Any):
    with pytest.raises(EngineError, match=r"weight_versions \(vLLM 0.32\)"):
        BACKEND.read_completion(answer, INFO, 0)


def test_tokens_without_logprobs_are_refused():
    with pytest.raises(EngineError, match="4 tokens, 0 log-probs"):
        BACKEND.read_completion(completion(logprobs=None), INFO, 0)


def test_a_whole_answer_says_why_it_ended():
    with pytest.raises(EngineError, match="without a finish_reason"):
        BACKEND.read_completion(completion(finish_reason=None), INFO, 0)


def test_a_request_asks_for_all_that_the_episode_needs():
    params = SamplingParams(max_new_tokens=4, temperature=0.7, stop_token_ids=(2, 3))
    request = GenerationRequest(np.array([4, 5, 6]), params, seed=10)
    call = BACKEND.generate(request, INFO, stream=False)
    assert (call.method, call.path) == ("POST", "/inference/v1/generate")
    assert call.body == {
        "model": "m",
        "token_ids": [4, 5, 6],
        "sampling_params": {
            "max_tokens": 4,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "seed": 13,
            "stop_token_ids": [2, 3],
            "ignore_eos": True,
        },
    }


def test_top_k_is_sent_where_it_is_set_and_seeds_stay_in_range():
    params = SamplingParams(max_new_tokens=1, top_k=5, allow_truncated_sampling=True)
    request = GenerationRequest(np.array([4]), params, seed=2**63 - 1)
    body = BACKEND.generate(request, INFO, stream=False).body
    assert body is not None and body["sampling_params"]["top_k"] == 5
    assert body["sampling_params"]["seed"] == 0


def test_what_a_server_says_of_itself():
    assert BACKEND.name == "vllm"
    hello = Call("POST", "/collective_rpc", {"method": "sdp_hello", "kwargs": {}})
    models, world = Call("GET", "/v1/models"), Call("GET", "/get_world_size")
    assert BACKEND.describe() == (models, world, hello)
    assert BACKEND.read_description([MODELS, {"world_size": 1}, HELLO]) == INFO
    assert BACKEND.read_description([MODELS, {"world_size": 4}, HELLO]).num_workers == 4
    for odd in (None, [], {"data": []}, {"data": [{"id": "m", "max_model_len": "long"}]}):
        with pytest.raises(EngineError, match="/v1/models without data"):
            BACKEND.read_description([odd, {"world_size": 1}, HELLO])
    with pytest.raises(EngineError, match="/get_world_size without world_size"):
        BACKEND.read_description([MODELS, {}, HELLO])


def test_versions_are_set_asked_and_read():
    call = BACKEND.set_version("1")
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
    assert BACKEND.load(LoadFolder("/f")) == Call("POST", "/collective_rpc", body)


@pytest.mark.parametrize(
    ("call", "answer", "odd"),
    [
        (BACKEND.pause("interrupt", "keep"), {"status": "paused"}, {"status": "resumed"}),
        (BACKEND.pause("keep", "recompute"), {"status": "paused"}, None),
        (BACKEND.resume(), {"status": "resumed"}, {"status": "paused"}),
        (BACKEND.resume(), {"status": "resumed"}, {}),
        (BACKEND.load(LoadFolder("/f")), {"results": [None]}, {"results": []}),
        (BACKEND.load(LoadFolder("/f")), {"results": [None]}, [1]),
        (BACKEND.set_version("1"), {"success": True, "new_version": "1"}, {"success": False}),
        (
            BACKEND.load(Receive("h", 1, "k", 2, 3.0)),
            {"results": [None, None]},
            {"status": "paused"},
        ),
        (BACKEND.load(LoadAdapter("a", "/f")), "Success: LoRA adapter 'a' added.", ""),
        (BACKEND.load(LoadAdapter("a", "/f")), "Success: LoRA adapter 'a' added.", "no such"),
        (
            BACKEND.load(EngineTransfer("init", {})),
            {"message": "Weight transfer initialized"},
            {"status": "ok"},
        ),
        (BACKEND.load(EngineTransfer("finish", {})), {"message": "finished"}, {"message": ""}),
    ],
)
def test_what_was_told_is_done_when_the_answer_says_so(call: Call, answer: Any, odd: Any):
    BACKEND.read_done(call, answer)
    with pytest.raises(EngineError, match=f"vLLM answered {call.path.partition('?')[0]} without"):
        BACKEND.read_done(call, odd)


def test_a_probe_asks_for_one_token_at_its_temperature():
    body = BACKEND.probe(INFO, 0.5).body
    assert body is not None
    sampling = body["sampling_params"]
    assert (sampling["max_tokens"], sampling["temperature"]) == (1, 0.5)


def test_logprobs_that_follow_the_temperature_pass_and_others_name_the_flag():
    BACKEND.read_probe(INFO, probed(-1.0, -2.0), probed(-0.5, -3.0))
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        BACKEND.read_probe(INFO, probed(-1.0, -2.0), probed(-1.0, -2.0))
    with pytest.raises(EngineError, match="top_logprobs"):
        BACKEND.read_probe(INFO, {"choices": []}, probed(-1.0))


# Every way that weights travel --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "call"),
    [
        (
            Receive("10.0.0.1", 7, "k", 2, 5.0),
            Call(
                "POST",
                "/collective_rpc",
                {
                    "method": "sdp_receive",
                    "kwargs": {
                        **{"host": "10.0.0.1", "port": 7, "key": "k"},
                        **{"num_workers": 2, "timeout_s": 5.0, "use": "load"},
                    },
                },
            ),
        ),
        (
            LoadAdapter("a", "/f"),
            Call(
                "POST",
                "/v1/load_lora_adapter",
                {"lora_name": "a", "lora_path": "/f", "load_inplace": True},
                answer="text",
            ),
        ),
        (
            EngineTransfer("init", {"port": 1}),
            Call("POST", "/init_weight_transfer_engine", {"init_info": {"port": 1}}),
        ),
        (EngineTransfer("start", {}), Call("POST", "/start_weight_update")),
        (
            EngineTransfer("update", {"names": ["a"]}),
            Call("POST", "/update_weights", {"update_info": {"names": ["a"]}}),
        ),
        (EngineTransfer("finish", {}), Call("POST", "/finish_weight_update")),
    ],
)
def test_every_instruction_is_one_call(instruction: Instruction, call: Call):
    assert BACKEND.load(instruction) == call
