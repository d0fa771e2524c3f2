from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.testing import tiny_model
from support.embedded_engines import MakeEngine, engine_maker, full_logprobs, generate, request


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer_types", ["full_attention", "linear_attention"], "llama has layers of linear_att"),
        ("rope_parameters", {"rope_type": "dynamic"}, "llama scales its rotary .*'dynamic'"),
        ("rope_parameters", {"full_attention": {"rope_type": "longrope"}}, "rotary .*'longrope'"),
    ],
)
def test_a_model_whose_kv_is_not_all_of_its_state_is_refused(make_engine, name, value, message):
    model = tiny_model()
    setattr(model.config, name, value)
    with pytest.raises(EngineError, match=message + r'.*engine="vllm://'):
        make_engine(model)


def test_more_tokens_than_the_model_has_positions_are_refused(make_engine):
    with pytest.raises(EngineError, match="max_length=513 exceeds the 512"):
        make_engine(max_length=513)


def test_a_model_that_slots_decode_wrongly_is_refused(make_engine):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, args, out: out * out.shape[1])
    with pytest.raises(EngineError, match=r'llama cannot .*: log-probs differ.*engine="vllm://'):
        make_engine(model)


def test_a_model_that_cannot_run_by_slots_is_refused(make_engine):
    model = tiny_model()

    def refuse(module, args, kwargs) -> None:
        if kwargs.get("past_key_values") is not None:
            raise TypeError("no cache, please")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(
        EngineError,
        match=r'llama cannot be decoded by this engine.*no cache, please.*engine="vllm://',
    ):
        make_engine(model)


def test_bfloat16_logprobs_are_close_to_float32(make_engine):
    model = tiny_model()
    _, ((segment,),) = generate(make_engine(model, dtype=torch.bfloat16), [request([5, 6], 20)])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    assert np.abs(segment.logprobs - expected).mean() < 0.1


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="max_slots must be an integer of at least 1, got 0"):
        EmbeddedEngine("some/model", max_slots=0)
