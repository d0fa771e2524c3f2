"""SGLang's wire format, held to answers of the form that the source of SGLang 0.5.23 gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import (
    Call,
    Chunk,
    RemoteInfBackend,
    Span,
    assemble,
)
from sdp_lightning.engines.remote.sglang import SGLangBackend
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import SamplingParams
from sdp_lightning.weights.protocol import EngineTransfer, LoadAdapter, LoadFolder, Receive

BACKEND: RemoteInfBackend = SGLangBackend()
MODEL = {
    "model_path": "Qwen/Qwen2.5-0.5B",
    "served_model_name": "Qwen/Qwen2.5-0.5B",
    "tokenizer_path": "Qwen/Qwen2.5-0.5B",
    "is_generation": True,
    "preferred_sampling_params": None,
    "weight_version": "default",
    "load_format": "auto",
    "model_type": "qwen2",
}
SERVER = {
    "model_path": "Qwen/Qwen2.5-0.5B",
    "context_length": None,
    "tp_size": 1,
    "incremental_streaming_output": False,
    "status": "ready",
    "max_total_num_tokens": 912312,
    "max_req_input_len": 32762,
    "internal_states": [{"last_gen_throughput": 0.0}],
    "version": "0.5.23",
}
INFO = BACKEND.read_description([MODEL, SERVER])
DELTAS = BACKEND.read_description([MODEL, SERVER | {"incremental_streaming_output": True}])
LENGTH = {"type": "length", "length": 4}
STOP = {"type": "stop", "matched": 59}
ABORT = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}

GENERATED: dict[str, Any] = {
    "text": " a b c d",
    "output_ids": [14, 31, 50, 59],
    "meta_info": {
        "id": "0f3c0d0c4e0e4a59a5d7a5d1e4a4b3b2",
        "finish_reason": LENGTH,
        "prompt_tokens": 3,
        "weight_version": "7",
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [
            [-0.657286524772644, 14, None],
            [-1.5, 31, None],
            [-2.25, 50, None],
            [-0.125, 59, None],
        ],
        "output_token_logprobs_length": 4,
        "reasoning_tokens": 0,
        "completion_tokens": 4,
        "cached_tokens": 1,
        "weight_versions": [{"version": "7", "start": 0, "end": 4}],
        "e2e_latency": 0.061,
    },
}
WHOLE = Span("7", (14, 31, 50, 59), (-0.657286524772644, -1.5, -2.25, -0.125))


def generated(output_ids: Any = None, *, without: str = "", **meta: Any) -> dict[str, Any]:
    answer = copy.deepcopy(GENERATED)
    if output_ids is not None:
        answer["output_ids"] = output_ids
    answer["meta_info"] |= meta
    answer["meta_info"].pop(without, None)
    return answer


def request(*, seed: int = 0, **params: Any) -> GenerationRequest:
    return GenerationRequest(np.array([4, 5, 6]), SamplingParams(**params), seed=seed)


# Requests -----------------------------------------------------------------------------------------


def test_a_request_asks_for_all_that_the_episode_needs_and_leaves_no_default_to_the_server():
    asked = request(seed=10, max_new_tokens=4, temperature=0.7, stop_token_ids=(2, 3))
    call = BACKEND.generate(asked, INFO, stream=False)
    assert (call.method, call.path) == ("POST", "/generate")
    assert call.body == {
        "input_ids": [4, 5, 6],
        "sampling_params": {
            "max_new_tokens": 4,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "stop_token_ids": [2, 3],
            "ignore_eos": False,
            "sampling_seed": 10,
        },
        "return_logprob": True,
        "stream": False,
    }


def sampling_of(asked: GenerationRequest) -> dict[str, Any]:
    body = BACKEND.generate(asked, INFO, stream=False).body
    assert body is not None
    return body["sampling_params"]


def test_without_stop_tokens_nothing_ends_a_completion_but_its_budget():
    assert sampling_of(request())["ignore_eos"] is True


def test_a_seed_stays_in_the_range_that_sglang_takes():
    assert sampling_of(request(seed=2**63 + 5))["sampling_seed"] == 5


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 5}], ids=["top_p", "top_k"])
def test_truncated_sampling_is_refused_because_logprobs_leave_it_out(truncation: Any):
    asked = request(allow_truncated_sampling=True, **truncation)
    name, value = next(iter(truncation.items()))
    with pytest.raises(EngineError, match=f"log-probs leave .*{name}={value} .*out"):
        BACKEND.generate(asked, INFO, stream=False)


def test_streams_are_asked_of_servers_that_send_only_what_is_new():
    body = BACKEND.generate(request(), DELTAS, stream=True).body
    assert body is not None and body["stream"] is True
    with pytest.raises(EngineError, match="--incremental-streaming-output"):
        BACKEND.generate(request(), INFO, stream=True)


# Completions --------------------------------------------------------------------------------------


def test_a_completion_is_one_span_of_the_version_it_was_sent_under():
    read = BACKEND.read_completion(GENERATED, INFO, 7)
    assert read.spans == (WHOLE,) and read.finish_reason == "length"


@pytest.mark.parametrize(
    ("reason", "read"),
    [
        (STOP, "stop"),
        (LENGTH, "length"),
        (ABORT, "abort"),
        ({"type": "abort", "message": "Abort in waiting queue"}, "abort"),
    ],
)
def test_reasons_to_end_are_read(reason: Any, read: str):
    assert BACKEND.read_completion(generated(finish_reason=reason), INFO, 7).finish_reason == read


@pytest.mark.parametrize(
    "reason",
    [
        {"type": "abort", "message": "out of memory", "status_code": 500, "err_type": "Odd"},
        {"type": "stop", "matched": "NaN happened"},
    ],
)
def test_a_request_that_went_wrong_is_an_error_and_not_an_end(reason: Any):
    with pytest.raises(EngineError, match=r"SGLang ended a request with .*(memory|NaN)"):
        BACKEND.read_completion(generated(finish_reason=reason), INFO, 7)


def test_an_interruption_before_the_first_token_has_no_span():
    empty = {"weight_versions": [{"version": "6", "start": 0, "end": 0}]}
    answer = generated([], output_token_logprobs=[], finish_reason=ABORT, **empty)
    read = BACKEND.read_completion(answer, INFO, 7)
    assert read.spans == () and read.finish_reason == "abort"


def test_a_server_that_names_no_version_is_taken_at_the_version_of_the_request():
    answer = generated(without="weight_versions", weight_version=None)
    assert BACKEND.read_completion(answer, INFO, 3).spans == (replace(WHOLE, version="3"),)


@pytest.mark.parametrize("label", ["8", "default"])
def test_tokens_are_of_the_version_that_the_server_names(label: str):
    answer = generated(without="weight_versions", weight_version=label)
    assert BACKEND.read_completion(answer, INFO, 7).spans == (replace(WHOLE, version=label),)


def test_versions_that_changed_under_a_request_divide_its_tokens():
    spans = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 4}]
    read = BACKEND.read_completion(generated(weight_versions=spans, weight_version="8"), INFO, 7)
    assert [(s.version, s.token_ids) for s in read.spans] == [("7", (14,)), ("8", (31, 50, 59))]


def test_spans_that_do_not_cover_every_token_are_refused():
    spans = [{"version": "7", "start": 0, "end": 3}]
    with pytest.raises(EngineError, match="they must agree"):
        BACKEND.read_completion(generated(weight_versions=spans), INFO, 7)


def test_a_request_aborted_in_the_queue_keeps_what_it_had():
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    answer = generated(finish_reason=reason, without="prompt_tokens")
    read = BACKEND.read_completion(answer, INFO, 7)
    assert read.spans == (WHOLE,) and read.finish_reason == "abort"


@pytest.mark.parametrize(
    "logprobs",
    [
        [],
        GENERATED["meta_info"]["output_token_logprobs"][:3],
        [*GENERATED["meta_info"]["output_token_logprobs"], [-1.0, 1, None]],
        [[-1.0, token, None] for token in (14, 31, 50, 60)],
    ],
    ids=["none", "one too few", "one too many", "another token"],
)
def test_logprobs_that_are_not_of_the_tokens_are_refused(logprobs: Any):
    with pytest.raises(EngineError, match="they must agree"):
        BACKEND.read_completion(generated(output_token_logprobs=logprobs), INFO, 7)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "text",
        {},
        {"error": {"message": "odd"}},
        {"output_ids": [1]},
        {"output_ids": [1], "meta_info": []},
        generated(finish_reason=None),
        generated(finish_reason="length"),
        generated(finish_reason={}),
        generated(finish_reason={"type": "error"}),
        generated("x"),
        generated(["x", 1, 2, 3]),
        generated(without="output_token_logprobs"),
        generated(output_token_logprobs=[[None, 14, None]] * 4),
        generated(output_token_logprobs=[[-1.0]] * 4),
        generated(output_token_logprobs=None),
        generated(weight_versions=[{"start": 0, "end": 4}]),
        generated(weight_versions=[7]),
        generated(weight_versions=None, completion_tokens=None),
    ],
)
def test_another_form_is_an_error_that_says_what_was_wanted(answer: Any):
    with pytest.raises(EngineError, match=r"SGLang answered /generate without .*meta_info\."):
        BACKEND.read_completion(answer, INFO, 7)


# Chunks -------------------------------------------------------------------------------------------


def chunk(tokens: list[int], so_far: int, reason: Any = None, **meta: Any) -> dict[str, Any]:
    entries = [[-0.5, token, None] for token in tokens]
    told = {"output_token_logprobs": entries, "finish_reason": reason, "completion_tokens": so_far}
    return generated(tokens, without="weight_versions", **told, **meta)


def test_chunks_hold_the_next_tokens_and_the_versions_of_all_so_far():
    first = BACKEND.read_chunk(chunk([14, 31], 2), DELTAS)
    assert first == Chunk((14, 31), (-0.5, -0.5), None, (("7", 0, 2),))
    spans = [{"version": "7", "start": 0, "end": 2}, {"version": "8", "start": 2, "end": 3}]
    last = chunk([59], 3, STOP)
    last["meta_info"]["weight_versions"] = spans
    read = BACKEND.read_chunk(last, DELTAS)
    assert read == Chunk((59,), (-0.5,), "stop", (("7", 0, 2), ("8", 2, 3)))
    whole = assemble([first, read], 7)
    assert [(s.version, s.token_ids) for s in whole.spans] == [("7", (14, 31)), ("8", (59,))]


def test_the_token_that_an_abort_in_the_queue_repeats_is_not_read_twice():
    answer = chunk([31], 2, {"type": "abort", "message": "Abort in waiting queue"})
    answer["meta_info"]["output_token_logprobs"] = [[-0.5, 14, None], [-0.5, 31, None]]
    del answer["meta_info"]["prompt_tokens"]
    read = BACKEND.read_chunk(answer, DELTAS)
    assert read == Chunk((), (), "abort", (("7", 0, 2),))
    assert BACKEND.read_chunk(chunk([31], 2, ABORT), DELTAS).token_ids == (31,)


def test_an_error_in_a_stream_is_an_error():
    with pytest.raises(EngineError, match="odd input"):
        BACKEND.read_chunk({"error": {"message": "odd input", "code": 400}}, DELTAS)


# Echo ---------------------------------------------------------------------------------------------


def test_an_echo_samples_nothing_and_reads_every_token_but_the_first():
    call = BACKEND.prompt_logprobs([4, 5, 6], INFO)
    assert call.path == "/generate" and call.body is not None
    assert call.body["logprob_start_len"] == 0 and call.body["return_logprob"] is True
    sampling = call.body["sampling_params"]
    assert (sampling["max_new_tokens"], sampling["temperature"]) == (0, 1.0)
    entries = [[None, 4, None], [-1.25, 5, None], [-2.5, 6, None]]
    assert BACKEND.read_prompt_logprobs(echoed(*entries), [4, 5, 6]) == (-1.25, -2.5)


def echoed(*entries: Any) -> dict[str, Any]:
    return generated([], input_token_logprobs=list(entries))


def test_the_last_id_of_a_vocabulary_is_echoed_as_0():
    read = BACKEND.read_prompt_logprobs(echoed([None, 4, None], [-1.0, 0, None]), [4, 151_935])
    assert read == (-1.0,)


@pytest.mark.parametrize(
    "entries",
    [
        [[None, 4, None], [-1.0, 5, None]],
        [[None, 4, None], [-1.0, 7, None], [-1.0, 6, None]],
        [[None, 4, None], [-1.0, 5, None], [-1.0, 6, None], [-1.0, 6, None]],
    ],
    ids=["too few", "another token", "too many"],
)
def test_an_echo_of_another_text_is_refused(entries: Any):
    with pytest.raises(EngineError, match=r"SGLang echoed .* for \[4, 5, 6\]"):
        BACKEND.read_prompt_logprobs(echoed(*entries), [4, 5, 6])


@pytest.mark.parametrize(
    "answer", [None, {}, {"meta_info": {}}, echoed(None), echoed([None, 4, None], [None, 5, None])]
)
def test_an_echo_of_another_form_is_refused(answer: Any):
    with pytest.raises(EngineError, match=r"without meta_info\.input_token_logprobs"):
        BACKEND.read_prompt_logprobs(answer, [4, 5])


# What a server is ---------------------------------------------------------------------------------


def test_what_a_server_says_of_itself():
    assert BACKEND.name == "sglang"
    assert BACKEND.describe() == (Call("GET", "/model_info"), Call("GET", "/server_info"))
    assert (INFO.model, INFO.max_length) == ("Qwen/Qwen2.5-0.5B", 32762)
    assert not INFO.has_spans
    assert BACKEND.fallback(INFO) is None


@pytest.mark.parametrize("odd", [None, [], {}, "x"])
def test_a_description_of_another_form_names_the_route(odd: Any):
    with pytest.raises(EngineError, match="/model_info without model_path"):
        BACKEND.read_description([odd, SERVER])
    with pytest.raises(EngineError, match="/server_info without max_req_input_len"):
        BACKEND.read_description([MODEL, odd])


def test_a_sign_of_life_is_asked_of_a_route_that_answers_while_sampling_is_paused():
    assert BACKEND.health() == Call("GET", "/server_info")  # /health would sample a token


def probed(*logprobs: float) -> dict[str, Any]:
    top = [[value, token, None] for token, value in enumerate(logprobs)]
    return {"output_ids": [0], "meta_info": {"output_top_logprobs": [top]}}


def test_a_probe_asks_for_the_best_of_one_token_at_its_temperature():
    body = BACKEND.probe(INFO, 0.5).body
    assert body is not None and body["return_logprob"] and body["top_logprobs_num"] == 5
    sampling = body["sampling_params"]
    assert (sampling["max_new_tokens"], sampling["temperature"]) == (1, 0.5)


def test_logprobs_that_follow_the_temperature_pass_and_others_name_the_setting():
    BACKEND.read_probe(INFO, probed(-1.0, -2.0), probed(-0.5, -3.0))
    with pytest.raises(EngineError, match="without SGLANG_RETURN_ORIGINAL_LOGPROB"):
        BACKEND.read_probe(INFO, probed(-1.0, -2.0), probed(-1.0, -2.0))
    for odd in (None, {}, {"meta_info": {"output_top_logprobs": []}}):
        with pytest.raises(EngineError, match="output_top_logprobs"):
            BACKEND.read_probe(INFO, odd, probed(-1.0))


# Control ------------------------------------------------------------------------------------------


def test_control_routes():
    assert BACKEND.resume() == Call("POST", "/continue_generation", {})
    paused = BACKEND.pause("interrupt", "recompute")
    assert paused == Call("POST", "/pause_generation", {"mode": "abort"})


@pytest.mark.parametrize(("on_update", "kv"), [("keep", "recompute"), ("interrupt", "keep")])
def test_what_sglang_does_not_do_across_an_update_is_refused(on_update: Any, kv: Any):
    with pytest.raises(ConfigError, match="kv_on_update='recompute'"):
        BACKEND.pause(on_update, kv)


def test_a_folder_is_loaded_whatever_the_server_started_from_and_clears_the_caches():
    body = {"model_path": "/f", "load_format": "auto", "flush_cache": True}
    call = Call("POST", "/update_weights_from_disk", body)
    assert BACKEND.load(LoadFolder("/f")) == call


@pytest.mark.parametrize(
    "instruction",
    [
        LoadAdapter("a", "/f"),
        Receive("h", 1, "k", num_workers=1, timeout_s=1.0),
        EngineTransfer("init", {}),
    ],
    ids=lambda i: type(i).__name__,
)
def test_other_transports_are_refused_with_the_one_to_use(instruction: Any):
    with pytest.raises(ConfigError, match=r"cannot carry out .*transport='files'"):
        BACKEND.load(instruction)


def test_versions_are_set_asked_and_read():
    body = {"new_version": "1", "abort_all_requests": False}
    assert BACKEND.set_version("1") == Call("POST", "/update_weight_version", body)
    assert BACKEND.get_version() == Call("GET", "/model_info")
    assert BACKEND.read_version(MODEL) == "default"
    for odd in (None, "x", {}, [1]):
        with pytest.raises(EngineError, match="/model_info without weight_version"):
            BACKEND.read_version(odd)


OK = {"message": "Generation paused successfully.", "status": "ok"}
LOADED = {"success": True, "message": "Succeeded.", "num_paused_requests": 0}


@pytest.mark.parametrize(
    ("call", "answer", "odd"),
    [
        (BACKEND.pause("interrupt", "recompute"), OK, {"status": "error"}),
        (BACKEND.pause("interrupt", "recompute"), OK, None),
        (BACKEND.resume(), OK, {}),
        (BACKEND.load(LoadFolder("/f")), LOADED, LOADED | {"success": False}),
        (BACKEND.load(LoadFolder("/f")), LOADED, [1]),
        (BACKEND.set_version("1"), {"success": True, "new_version": "1"}, {"success": False}),
    ],
)
def test_what_was_told_is_done_when_the_answer_says_so(call: Call, answer: Any, odd: Any):
    BACKEND.read_done(call, answer)
    with pytest.raises(EngineError, match=f"SGLang answered {call.path} without"):
        BACKEND.read_done(call, odd)
