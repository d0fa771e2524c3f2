"""SGLang's streams, prompt log-probs, descriptions and control routes."""

from __future__ import annotations

from typing import Any

import pytest

from sdp_lightning.engines.remote.backend import (
    Call,
    Chunk,
    assemble,
)
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import EngineTransfer, LoadAdapter, LoadFolder, Receive
from support.sglang_answers import ABORT, BACKEND, DELTAS, INFO, MODEL, SERVER, STOP, generated

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
