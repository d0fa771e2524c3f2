"""vLLM's streams, answers without spans, and prompt log-probs, as vLLM 0.32.0 sends them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import (
    Chunk,
    ServerInfo,
    Span,
    assemble,
)
from sdp_lightning.engines.remote.vllm import STREAM_INTERVAL
from sdp_lightning.errors import EngineError
from sdp_lightning.types import SamplingParams
from support.vllm_answers import (
    BACKEND,
    COMPLETION,
    INFO,
    TEXT,
    completion,
    probed,
    recorded_token,
    span,
)

PLAIN = ServerInfo(model="m", max_length=256, has_spans=False)


# Streams ------------------------------------------------------------------------------------------


def streamed(*tokens: int, **changes: Any) -> dict[str, Any]:
    """As recorded, from a server with spans."""
    content = [recorded_token(token, -token / 8) for token in tokens]
    choice = {
        **{"index": 0, "finish_reason": None, "stop_reason": None, "token_ids": list(tokens)},
        **{"routed_experts": None, "sampling_mask": None, "weight_versions": None},
        "logprobs": {"content": content},
    }
    told = {"request_id": "generate-tokens-bcc6", "usage": None, "output_mode": "tokens"}
    return told | {"choices": [choice | changes]}


def test_a_stream_is_asked_for_some_tokens_at_a_time():
    request = GenerationRequest(np.array([4]), SamplingParams(max_new_tokens=4))
    body = BACKEND.generate(request, INFO, stream=True).body
    whole = BACKEND.generate(request, INFO, stream=False).body
    assert body is not None and whole is not None
    assert body["stream"] is True and "stream" not in whole
    assert body["sampling_params"].pop("stream_interval") == STREAM_INTERVAL
    assert {k: v for k, v in body.items() if k != "stream"} == whole


def test_chunks_follow_one_another_and_the_last_one_knows_the_versions():
    spans = [span("1", 0, 2), span("2", 2, 4)]
    answers = [
        streamed(43),
        streamed(43, 46),
        streamed(21, finish_reason="length", weight_versions=spans),
    ]
    chunks = [BACKEND.read_chunk(answer, INFO) for answer in answers]
    assert [chunk.token_ids for chunk in chunks] == [(43,), (43, 46), (21,)]
    assert [chunk.edges for chunk in chunks] == [None, None, (("1", 0, 2), ("2", 2, 4))]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]
    done = assemble(chunks, 9)
    assert [(s.version, s.token_ids) for s in done.spans] == [("1", (43, 43)), ("2", (46, 21))]
    assert done.finish_reason == "length"


def test_an_interrupted_stream_may_end_with_an_empty_chunk():
    last = streamed(finish_reason="abort", weight_versions=[span("4", 0, 1)])
    chunks = [BACKEND.read_chunk(streamed(43), INFO), BACKEND.read_chunk(last, INFO)]
    done = assemble(chunks, 4)
    assert [(s.version, s.token_ids) for s in done.spans] == [("4", (43,))]
    assert done.finish_reason == "abort"


def test_a_last_chunk_of_tokens_without_versions_is_refused():
    with pytest.raises(EngineError, match=r"without weight_versions \(vLLM 0.32\)"):
        BACKEND.read_chunk(streamed(43, finish_reason="length"), INFO)


def test_a_stream_that_broke_off_is_an_interruption_under_the_version_it_was_sent_under():
    assert assemble([], 3).spans == () and assemble([], 3).finish_reason == "abort"
    cut = assemble([Chunk((5,), (-1.0,)), Chunk((6, 7), (-2.0, -3.0))], 3)
    assert cut.spans == (Span("3", (5, 6, 7), (-1.0, -2.0, -3.0)),)
    assert cut.finish_reason == "abort"


@pytest.mark.parametrize(
    ("tokens", "logprobs"),
    [
        ((5, 6), (-1.0,)),
        ((True,), (-1.0,)),
        ((5.0,), (-1.0,)),
        ((-5,), (-1.0,)),
        ((2**31,), (-1.0,)),
        ((5,), (float("nan"),)),
        ((5,), (0.01,)),
    ],
)
def test_a_chunk_of_another_backend_is_held_to_the_same(tokens: Any, logprobs: Any):
    with pytest.raises(EngineError, match="the server answered"):
        Chunk(tokens, logprobs)


@pytest.mark.parametrize(
    "chunks",
    [
        [Chunk((5,), (-1.0,)), Chunk((6,), (-1.0,), "length", (("1", 0, 1),))],
        [Chunk((5,), (-1.0,)), Chunk((6,), (-1.0,), "length", (("1", 1, 2),))],
        [Chunk((5,), (-1.0,), "length", (("1", 0, 2),))],
    ],
)
def test_chunks_whose_versions_are_of_other_tokens_are_refused(chunks: list[Chunk]):
    with pytest.raises(EngineError, match="they must agree"):
        assemble(chunks, 1)


# Servers without spans ----------------------------------------------------------------------------


def text(**changes: Any) -> dict[str, Any]:
    answer = copy.deepcopy(TEXT)
    answer["choices"][0] |= changes
    return answer


def test_a_server_falls_back_once():
    assert BACKEND.fallback(INFO) == PLAIN
    assert BACKEND.fallback(PLAIN) is None


def test_a_request_without_spans_asks_for_the_same_and_for_its_tokens():
    params = SamplingParams(max_new_tokens=4, temperature=0.7, stop_token_ids=(2, 3))
    request = GenerationRequest(np.array([4, 5, 6]), params, seed=10)
    call = BACKEND.generate(request, PLAIN, stream=False)
    assert (call.method, call.path) == ("POST", "/v1/completions")
    with_spans = BACKEND.generate(request, INFO, stream=False).body
    assert with_spans is not None
    assert call.body == {
        **{"model": "m", "prompt": [4, 5, 6], "return_token_ids": True},
        **with_spans["sampling_params"],
    }
    body = BACKEND.generate(request, PLAIN, stream=True).body
    assert body == {**call.body, "stream": True}


def test_a_recorded_text_completion_is_of_the_version_it_was_sent_under():
    done = BACKEND.read_completion(TEXT, PLAIN, 7)
    logprobs = (-1.0715653896331787, -1.405820608139038, -2.549502372741699)
    assert done.spans == (Span("7", (43, 43, 3), logprobs),)
    assert done.finish_reason == "length"


def test_an_interrupted_text_completion_without_tokens_has_no_span():
    nothing = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for told in (nothing, None):
        answer = text(token_ids=[], logprobs=told, finish_reason="abort")
        done = BACKEND.read_completion(answer, PLAIN, 7)
        assert done.spans == () and done.finish_reason == "abort"


def test_chunks_of_text_have_no_versions():
    chunk = BACKEND.read_chunk(text(finish_reason=None), PLAIN)
    assert (chunk.token_ids, chunk.edges, chunk.finish_reason) == ((43, 43, 3), None, None)


@pytest.mark.parametrize("answer", [None, {"choices": []}, text(token_ids=["x"]), COMPLETION])
def test_text_of_another_form_names_its_route(answer: Any):
    with pytest.raises(EngineError, match="vLLM answered /v1/completions without"):
        BACKEND.read_completion(answer, PLAIN, 0)


def probed_text(**top: float) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


def test_a_probe_of_text_holds_a_server_to_the_same():
    call = BACKEND.probe(PLAIN, 0.5)
    assert call.path == "/v1/completions" and call.body is not None
    assert (call.body["max_tokens"], call.body["temperature"]) == (1, 0.5)
    BACKEND.read_probe(PLAIN, probed_text(a=-1.0, b=-2.0), probed_text(a=-0.5, b=-3.0))
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        BACKEND.read_probe(PLAIN, probed_text(a=-1.0, b=-2.0), probed_text(a=-1.0, b=-2.0))
    for odd in ({"choices": []}, {"choices": [{"logprobs": None}]}, probed(-1.0)):
        with pytest.raises(EngineError, match="/v1/completions without top_logprobs"):
            BACKEND.read_probe(PLAIN, odd, probed_text(a=-1.0))


# Echoes -------------------------------------------------------------------------------------------

ECHOED = [
    None,
    {"2": {"logprob": -3.7184910774230957, "rank": 6, "decoded_token": "<unk>"}},
    {
        "3": {"logprob": -4.479767799377441, "rank": 21, "decoded_token": "0"},
        "43": {"logprob": -1.266567587852478, "rank": 1, "decoded_token": "/"},
    },
]


@pytest.mark.parametrize(
    ("info", "path"), [(INFO, "/inference/v1/generate"), (PLAIN, "/v1/completions")]
)
def test_an_echo_asks_for_the_prompt_at_temperature_one(info: ServerInfo, path: str):
    call = BACKEND.prompt_logprobs([1, 2, 3], info)
    assert call.body is not None
    asked = call.body["sampling_params"] if info.has_spans else call.body
    assert (asked["prompt_logprobs"], asked["temperature"]) == (0, 1.0)
    assert call.body["token_ids" if info.has_spans else "prompt"] == [1, 2, 3]
    assert call.path == path


@pytest.mark.parametrize(
    "answer",
    [
        completion() | {"prompt_logprobs": ECHOED},
        text(prompt_logprobs=ECHOED),
    ],
    ids=["at the top", "in the choice"],
)
def test_an_echo_is_the_log_prob_of_every_token_but_the_first(answer: Any):
    assert BACKEND.read_prompt_logprobs(answer, [1, 2, 3]) == (
        -3.7184910774230957,
        -4.479767799377441,
    )


@pytest.mark.parametrize(
    "answer",
    [
        *(None, [], {}, {"choices": []}, completion(), completion() | {"prompt_logprobs": None}),
        completion() | {"prompt_logprobs": ECHOED[:2]},
        completion() | {"prompt_logprobs": [None, ECHOED[2], ECHOED[2]]},
        completion() | {"prompt_logprobs": [None, {"2": {}}, ECHOED[2]]},
    ],
)
def test_an_echo_of_another_text_is_refused(answer: Any):
    with pytest.raises(EngineError, match="a prompt without prompt_logprobs of every token"):
        BACKEND.read_prompt_logprobs(answer, [1, 2, 3])
