"""Answers changed at random: each is read, or is one named error; nothing else comes of it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sdp_lightning.engines.remote.backend import Chunk, Completion, ServerInfo, assemble
from sdp_lightning.engines.remote.responses import ServerError, parse_json
from sdp_lightning.errors import EngineError
from support import sglang_answers as sglang, vllm_answers as vllm
from support.fuzzed_answers import mutated
from support.raw_server import Asker, asker, http

__all__ = ["asker"]  # a fixture

PLAIN = replace(vllm.INFO, has_spans=False)
ECHO = [None, {"2": {"logprob": -3.5, "rank": 6}}, {"3": {"logprob": -4, "rank": 1}}]
STREAMED = vllm.completion(finish_reason=None, weight_versions=None)
TOP = [[-1.0, 0, None], [-2.0, 1, None]]
TYPES = {"results": [["bfloat16", "float32"]]}
# What a server was asked for: its true answer, and how that is read.
CALLS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "vllm completion": (
        vllm.COMPLETION,
        lambda answer: vllm.BACKEND.read_completion(answer, vllm.INFO, 0),
    ),
    "vllm text": (vllm.TEXT, lambda answer: vllm.BACKEND.read_completion(answer, PLAIN, 7)),
    "vllm chunk": (STREAMED, lambda answer: vllm.BACKEND.read_chunk(answer, vllm.INFO)),
    "vllm stream": (
        vllm.completion(weight_versions=[vllm.span("3", 0, 8)]),
        lambda answer: assemble(
            [vllm.BACKEND.read_chunk(a, vllm.INFO) for a in (STREAMED, answer)], 3
        ),
    ),
    "vllm echo": (
        vllm.COMPLETION | {"prompt_logprobs": ECHO},
        lambda answer: vllm.BACKEND.read_prompt_logprobs(answer, [1, 2, 3]),
    ),
    "vllm probe": (
        vllm.probed(-1.0, -2.0),
        lambda answer: vllm.BACKEND.read_probe(vllm.INFO, answer, vllm.probed(-0.5, -3.0)),
    ),
    "vllm models": (
        {"data": [{"id": "m", "max_model_len": 256}]},
        lambda answer: vllm.BACKEND.read_description([answer, {"world_size": 1}, TYPES]),
    ),
    "vllm world": (
        {"world_size": 1},
        lambda answer: vllm.BACKEND.read_description(
            [{"data": [{"id": "m", "max_model_len": 256}]}, answer, TYPES]
        ),
    ),
    "vllm types": (
        TYPES,
        lambda answer: vllm.BACKEND.read_description(
            [{"data": [{"id": "m", "max_model_len": 256}]}, {"world_size": 1}, answer]
        ),
    ),
    "vllm version": ({"weight_version": "3"}, vllm.BACKEND.read_version),
    "vllm done": (
        {"status": "paused"},
        lambda answer: vllm.BACKEND.read_done(vllm.BACKEND.pause("interrupt", "recompute"), answer),
    ),
    "sglang completion": (
        sglang.GENERATED,
        lambda answer: sglang.BACKEND.read_completion(answer, sglang.INFO, 7),
    ),
    "sglang chunk": (
        sglang.GENERATED,
        lambda answer: sglang.BACKEND.read_chunk(answer, sglang.DELTAS),
    ),
    "sglang echo": (
        sglang.generated(input_token_logprobs=[[None, 1, None], *TOP]),
        lambda answer: sglang.BACKEND.read_prompt_logprobs(answer, [1, 0, 1]),
    ),
    "sglang probe": (
        {"meta_info": {"output_top_logprobs": [TOP]}},
        lambda answer: sglang.BACKEND.read_probe(
            sglang.INFO, answer, {"meta_info": {"output_top_logprobs": [[[-0.5, 0, None]]]}}
        ),
    ),
    "sglang model": (
        sglang.MODEL,
        lambda answer: sglang.BACKEND.read_description([answer, sglang.SERVER]),
    ),
    "sglang server": (
        sglang.SERVER,
        lambda answer: sglang.BACKEND.read_description([sglang.MODEL, answer]),
    ),
    "sglang version": (sglang.MODEL, sglang.BACKEND.read_version),
}


def check_read(value: Any) -> None:
    """Fail unless what was read may be trained on."""
    match value:
        case Completion(spans):
            for span in spans:
                assert isinstance(span.version, str)
                check_tokens(span.token_ids, span.logprobs)
        case Chunk(token_ids, logprobs):
            check_tokens(token_ids, logprobs)
        case ServerInfo(model, max_length, num_workers):
            assert isinstance(model, str)
            assert type(max_length) is int and 1 <= max_length <= 2**31
            assert type(num_workers) is int and 1 <= num_workers <= 4096
        case tuple():
            assert all(math.isfinite(logprob) and logprob <= 1e-3 for logprob in value)
        case _:
            assert value is None or isinstance(value, str)


def check_tokens(token_ids: tuple[int, ...], logprobs: tuple[float, ...]) -> None:
    assert len(token_ids) == len(logprobs)
    assert all(type(token) is int and 0 <= token < 2**31 for token in token_ids)
    assert all(-3.5e38 < logprob <= 1e-3 for logprob in logprobs)


def fuzz(name: str, num_cases: int) -> None:
    answer, read = CALLS[name]
    check_read(read(answer))
    dice, outcomes = random.Random(name), Counter[str]()
    for _ in range(num_cases):
        data = mutated(answer, dice)
        try:
            check_read(read(parse_json("http://a", data)))
            outcomes["read"] += 1
        except EngineError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 1500
            outcomes["refused"] += 1
    assert outcomes["refused"] > num_cases / 10


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.fault("corrupted data", "generate", only="completion|text|chunk|stream")
@pytest.mark.fault("corrupted data", "publish", only="version|done|model|world|server|probe|echo")
def test_an_answer_changed_at_random_is_read_or_one_named_error(name: str):
    fuzz(name, 2000 // len(CALLS) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_thousand_answers_are_read_or_one_named_error_each(name: str):
    fuzz(name, 100_000 // len(CALLS) + 1)


def test_what_comes_over_a_socket_is_a_completion_or_one_error_of_that_server(asker: Asker):
    """Odd JSON, and odd HTTP around it."""
    dice, outcomes = random.Random(4), Counter[str]()
    for number in range(60):
        data = http(mutated(vllm.completion(), dice) if number % 3 else vllm.completion())
        if number % 2:
            place = dice.randrange(len(data))
            data = data[:place] + bytes([dice.randrange(256)]) + data[place + dice.randrange(3) :]
        try:
            check_read(asker.complete(data, request_timeout_s=5.0))
            outcomes["read"] += 1
        except ServerError as error:
            assert str(error).startswith(asker.url)
            outcomes["refused"] += 1
    assert outcomes["read"] > 5 and outcomes["refused"] > 20
