"""SGLang's wire format, held to answers of the form that the source of SGLang 0.5.23 gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import (
    Span,
)
from sdp_lightning.errors import EngineError
from sdp_lightning.types import SamplingParams
from support.sglang_answers import ABORT, BACKEND, DELTAS, GENERATED, INFO, LENGTH, STOP, generated

WHOLE = Span("7", (14, 31, 50, 59), (-0.657286524772644, -1.5, -2.25, -0.125))


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


def test_a_request_that_went_wrong_is_an_error_and_not_an_end():
    reason = {"type": "abort", "message": "out of memory", "status_code": 500, "err_type": "Odd"}
    with pytest.raises(EngineError, match=r"SGLang ended a request with .*memory"):
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
