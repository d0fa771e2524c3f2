"""Stop texts on servers: what they are told, and what is made of how they end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.stop_texts import StopTexts
from support.fake_servers import GENERATE, Server, connected, servers
from support.remote_engines import Sending, publish
from support.sglang_engines import SGLangServer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module", params=[Server, SGLangServer], ids=["vllm", "sglang"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    arguments = ["--incremental"] if request.param is SGLangServer else []
    with servers(1, *arguments, kind=request.param) as running:
        yield running[0]


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def engine(server: Server, request: pytest.FixtureRequest) -> Iterator[RemoteInfEngine]:
    server.do(reset={}, faults=[])
    with connected(server, stream=request.param) as engine:
        publish(engine, 0, reset=True)
        yield engine


def asked(text: str, num_sampled: int = 0) -> GenerationRequest:
    """After a prompt of 3 tokens servers write 3456012...; ``num_sampled`` of it is there."""
    written = [p % 7 + 3 for p in range(3, 3 + num_sampled)]
    return GenerationRequest(
        np.array([0, 1, 2, *written]),
        SamplingParams(max_new_tokens=12, stop_texts=(text,)),
        num_sampled=num_sampled,
        stops=StopTexts((text,), TOKENIZER.decode),
    )


@pytest.mark.parametrize(
    ("text", "num_sampled", "told", "written", "reason"),
    [
        pytest.param("56", 0, ["56"], "3456", "stop", id="within a request"),
        pytest.param("56", 3, ["56", "6"], "6", "stop", id="begun in the request before"),
        pytest.param("50", 3, ["50", "0"], "60", "abort", id="not gone on with as it was begun"),
        pytest.param("56012", 4, ["56012", "012"], "012", "stop", id="long"),
    ],
)
def test_a_completion_ends_with_the_whole_text_only(
    engine: RemoteInfEngine,
    server: Server,
    text: str,
    num_sampled: int,
    told: list[str],
    written: str,
    reason: str,
):
    sending = Sending(engine, [asked(text, num_sampled)])
    assert sending.join() == [reason]
    tokens = [token for s in sending.segments[0] for token in s.token_ids.tolist()]
    assert TOKENIZER.decode(tokens) == written
    sampling = server.do()["seen"][-1]["sampling_params"]
    assert sampling["stop"] == told and sampling["skip_special_tokens"] is False


def test_a_text_that_was_not_asked_for_is_no_end(server: Server):
    """SGLang reports logits that are nan so."""
    server.do(reset={}, faults=[])
    is_vllm = type(server) is Server
    values = (
        {"choices.0.finish_reason": "stop", "choices.0.stop_reason": "NaN happened"}
        if is_vllm
        else {"meta_info.finish_reason": {"type": "stop", "matched": "NaN happened"}}
    )
    with connected(server, max_tries=1) as engine:
        publish(engine, 0, reset=True)
        server.alter(GENERATE if is_vllm else "/generate", values)
        (error,) = Sending(engine, [asked("56")]).join()
    assert "ended a request at 'NaN happened', which is none of its stop texts" in str(error)


# Tokens without a text ----------------------------------------------------------------------------


def test_tokens_without_a_text_are_made_impossible(engine: RemoteInfEngine, server: Server):
    engine.use_vocabulary(13)
    fine = replace(asked("56"), num_tokens=10)
    assert Sending(engine, [fine]).join() == ["stop"]
    bias = server.do()["seen"][-1]["sampling_params"]["logit_bias"]
    assert bias == {"10": -100.0, "11": -100.0, "12": -100.0}
    assert Sending(engine, [asked("56")]).join() == ["stop"]
    assert "logit_bias" not in server.do()["seen"][-1]["sampling_params"]


def test_a_server_that_samples_one_all_the_same_is_set_aside(server: Server):
    server.do(reset={}, faults=[])
    with connected(server, max_tries=1) as engine:
        publish(engine, 0, reset=True)
        engine.use_vocabulary(13)
        (error,) = Sending(engine, [replace(asked("56"), num_tokens=8)]).join()  # it writes 3456
    assert "answered token 9, which has no text, in spite of logit_bias" in str(error)
