"""Two servers of which one answers what cannot be: the other one carries the run."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import EngineError, RolloutError
from support.fake_servers import GENERATE, Server, connected, is_back
from support.remote_engines import Sending, generate, publish, request
from support.trainers import make_data, make_module, make_trainer, make_workflow

DEEP = b"[" * 200_000
BOMB = gzip.compress(b"[" + b" " * 2**25)  # 32 MiB
NOTHING: dict[str, Any] = {  # an interruption without a token
    "choices.0.token_ids": [],
    "choices.0.logprobs": None,
    "choices.0.weight_versions": [],
    "choices.0.finish_reason": "abort",
}
FAULTS: dict[str, Callable[[Server], None]] = {
    "nests deeply": lambda ill: ill.answer(GENERATE, DEEP),
    "unpacks to 32 MiB": lambda ill: ill.answer(GENERATE, BOMB, Content_Encoding="gzip"),
    "redirects": lambda ill: ill.answer(GENERATE, b"", 307, Location="http://127.0.0.1:9/"),
    "wants another key": lambda ill: ill.answer(GENERATE, b"who", 401),
    "has lost the model": lambda ill: ill.answer(GENERATE, b"no model", 404),
    "refuses what others accept": lambda ill: ill.answer(GENERATE, b"bad request", 400),
    "samples another vocabulary": lambda ill: ill.alter(GENERATE, {"choices.0.token_ids.0": 10**6}),
    "interrupts again and again": lambda ill: ill.alter(GENERATE, NOTHING),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault("corrupted data", "generate")
def test_requests_go_to_the_other_server_with_one_warning(
    two: list[Server], fault: str, caplog: pytest.LogCaptureFixture
):
    well, ill = two
    with connected(*two, health_interval_s=1000.0, vocab_size=256) as engine:
        publish(engine, 0, reset=True)
        FAULTS[fault](ill)
        with caplog.at_level(logging.WARNING):
            assert Sending(engine, [request() for _ in range(8)]).join() == ["length"] * 8
        assert engine.server_urls == [well.url] and engine.num_generated == 32
        assert [r.message.partition(" is taken out")[0] for r in caplog.records] == [ill.url]


@pytest.mark.fault("corrupted data", "generate")
def test_a_health_check_that_nests_deeply_takes_one_server_out_until_it_is_well(two: list[Server]):
    well, ill = two
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        ill.answer("/health", DEEP)
        is_back(engine, well, 1)
        publish(engine, 1)
        assert [s.version for s in generate(engine, request())] == [1]
        ill.do(faults=[])
        is_back(engine, well, 2)
        assert ill.do()["version"] == "1"


def test_a_request_that_both_servers_refuse_is_at_fault_and_costs_none(two: list[Server]):
    with connected(*two) as engine:
        publish(engine, 0, reset=True)
        for server in two:
            server.answer(GENERATE, b"bad request", 400)
        before = sum(server.do()["received"][GENERATE] for server in two)
        with pytest.raises(EngineError, match="answered 400: bad request"):
            generate(engine, request())
        assert engine.num_serving == 2
        assert sum(server.do()["received"][GENERATE] for server in two) == before + 2


def test_a_key_that_is_wrong_is_one_error_with_the_remedy(one: Server):
    with connected(one, recover_s=0.2, health_interval_s=1000.0) as engine:
        publish(engine, 0, reset=True)
        one.answer(GENERATE, b"who", 401)
        with pytest.raises(EngineError, match=r"answered 401: who .* as api_key, or SDP_API_KEY"):
            generate(engine, request())


@pytest.mark.fault("corrupted data", "publish")
def test_a_server_that_says_it_has_a_billion_workers_is_refused(one: Server):
    one.alter("/get_world_size", {"world_size": 10**9})
    with (
        pytest.raises(EngineError, match="1000000000 is no integer from 1 to 4096"),
        connected(one),
    ):
        pass


def test_a_fit_holds_servers_to_the_vocabulary_of_its_model(one: Server, model_folder: str):
    one.alter(GENERATE, {"choices.0.token_ids.0": 5000})
    options = {"recover_s": 0.2, "health_interval_s": 1000.0}
    data = make_data(make_workflow(), engine=f"vllm://{one.host}", engine_options=options)
    trainer = make_trainer(sdp.WeightSyncCallback(weight_check_every=0), max_steps=1)
    with pytest.raises(RolloutError, match=r"token 5000, but the model's vocabulary has \d+"):
        trainer.fit(make_module(model_folder), data)
