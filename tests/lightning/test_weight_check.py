"""The weight check: it passes where engine and trainer agree, and names what is stale where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.engines.embedded.model_checks import text_logprobs
from sdp_lightning.lightning.weight_check import WeightCheck
from sdp_lightning.testing import FakeEngine, tiny_model
from sdp_lightning.types import FloatArray, IntArray
from support.trainers import Recorder, make_data, make_module, make_trainer


def logprobs_of(model: Any) -> Callable[[IntArray], FloatArray]:
    return lambda tokens: text_logprobs(model, tokens).numpy()


def check(
    weights: WeightCheck, policy: Any, *engines: Any, off: float | FloatArray = 0.0
) -> float | None:
    """``off``: how far the trainer's scores are from the logits of its own model."""

    def score(trajectory: sdp.Trajectory) -> FloatArray:
        return logprobs_of(policy)(trajectory.token_ids) + np.float32(off)

    def ask(tokens: IntArray) -> dict[str, FloatArray]:
        return {f"engine{i}": logprobs_of(engine)(tokens) for i, engine in enumerate(engines)}

    size = int(policy.get_input_embeddings().weight.shape[0])
    return weights.check(policy, num_embeddings=size, score=score, ask=ask)


@torch.no_grad()
def train(model: Any) -> None:
    """Every weight moves."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def copy_of(model: Any, *, tied: bool = True) -> Any:
    copy = tiny_model(tie_word_embeddings=tied)
    copy.load_state_dict(model.state_dict())
    return copy


def test_an_engine_with_the_trainers_weights_passes_at_every_publish():
    weights, policy = WeightCheck(tolerance=1e-5), tiny_model()
    for _ in range(2):
        difference = check(weights, policy, copy_of(policy), copy_of(policy))
        assert difference is not None and difference < 1e-6
        train(policy)


@pytest.mark.fault("corrupted data", "publish")
def test_a_head_that_kept_the_old_embedding_is_named():
    weights, policy = WeightCheck(tolerance=1e-3), tiny_model(tie_word_embeddings=True)
    engine = copy_of(policy, tied=False)
    check(weights, policy, engine)
    train(policy)
    new = {name: value for name, value in policy.state_dict().items() if name != "lm_head.weight"}
    engine.load_state_dict(new, strict=False)
    with pytest.raises(sdp.EngineError, match=r"engine0 .* Most at fault: lm_head\.weight\. "):
        check(weights, policy, engine)


@pytest.mark.fault("corrupted data", "publish")
def test_of_several_engines_the_one_at_fault_is_named_with_its_parameter():
    weights, policy = WeightCheck(tolerance=1e-3), tiny_model()
    good, bad = copy_of(policy), copy_of(policy)
    check(weights, policy, good, bad)
    train(policy)
    good.load_state_dict(policy.state_dict())
    stale = "model.layers.1.mlp.up_proj.weight"
    new = {name: value for name, value in policy.state_dict().items() if name != stale}
    bad.load_state_dict(new, strict=False)
    with pytest.raises(sdp.EngineError, match=rf"engine1 .* Most at fault: {stale}\. "):
        check(weights, policy, good, bad)


def test_before_any_agreement_the_models_are_questioned():
    weights, policy = WeightCheck(tolerance=1e-3), tiny_model()
    with pytest.raises(sdp.EngineError, match="load the same model, tokenizer and dtype"):
        check(weights, policy, tiny_model(seed=9))


def test_where_no_parameter_explains_it_none_is_named():
    weights, policy = WeightCheck(tolerance=1e-3), tiny_model()
    check(weights, policy, policy)
    train(policy)
    with pytest.raises(sdp.EngineError, match="No single parameter"):
        check(weights, policy, tiny_model(seed=9))


def test_log_probs_that_are_not_finite_are_refused():
    weights, policy = WeightCheck(), tiny_model()
    broken = copy_of(policy)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(sdp.EngineError, match="differ from the trainer's by inf"):
        check(weights, policy, broken)


def test_the_model_itself_tells_which_side_is_wrong() -> None:
    weights, policy, other = WeightCheck(tolerance=1e-3), tiny_model(), tiny_model(seed=9)
    with pytest.raises(sdp.EngineError, match=r"engine0 .*: the engine is wrong\. .* 0 from "):
        check(weights, policy, other)
    with pytest.raises(sdp.EngineError, match=r"the trainer is wrong\. .* 0\.5 from the log"):
        check(weights, policy, copy_of(policy), off=-0.5)
    with pytest.raises(sdp.EngineError, match=r"both are off\. "):
        check(weights, policy, other, off=-2.0)
    torch.nn.init.constant_(policy.model.norm.weight, float("nan"))
    with pytest.raises(sdp.EngineError, match=r"the weights are wrong\. .* not finite: training"):
        check(weights, policy, copy_of(policy))


def test_a_text_has_no_more_tokens_than_the_model_has_positions_or_than_an_engine_answers() -> None:
    policy = tiny_model()
    policy.config.max_position_embeddings = 12
    asked: list[int] = []

    def ask(tokens: IntArray) -> dict[str, FloatArray]:
        asked.append(tokens.size)
        whole = logprobs_of(policy)(tokens)
        return {"short": whole[:4], "whole": whole, "deaf": whole[:0]}

    def compare(off: float) -> float | None:
        return WeightCheck(tolerance=1e-3, keep_weights=False).check(
            policy,
            num_embeddings=40,
            score=lambda text: logprobs_of(policy)(text.token_ids) + np.float32(off),
            ask=ask,
        )

    difference = compare(0.0)
    assert difference is not None and difference < 1e-6
    with pytest.raises(sdp.EngineError, match="short answers a text of 5 tokens"):
        compare(0.5)
    assert asked == [12, 12]


def test_frozen_weights_are_not_kept():
    weights, policy = WeightCheck(), tiny_model(tie_word_embeddings=True)
    policy.requires_grad_(False)
    policy.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(True)
    check(weights, policy, policy)
    assert list(weights._agreed) == ["model.layers.0.mlp.up_proj.weight"]


def test_a_fit_checks_after_the_first_publishes_and_every_nth(model_folder: str) -> None:
    recorder = Recorder()
    sync = sdp.WeightSyncCallback(weight_check_every=2, weight_check_tolerance=1e-4)
    trainer = make_trainer(sync, recorder, max_steps=5)
    trainer.fit(make_module(model_folder), make_data(max_head_lag=1))
    checked = [metrics.get("publish/echo") for metrics in recorder.metrics]
    assert checked[0] is not None and 0 <= checked[0] < 1e-4
    sync = sdp.WeightSyncCallback(weight_check_every=2, weight_check_tolerance=1e9)
    assert lengths_asked_for(sync, model_folder) == [64] * 4  # at versions 0, 1, 2 and 4


def test_unless_told_otherwise_a_fit_checks_once_and_says_what_that_cost(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, sync = Recorder(), sdp.WeightSyncCallback()
    with caplog.at_level("INFO", "sdp_lightning.lightning.weight_sync"):
        make_trainer(sync, recorder, max_steps=2).fit(make_module(model_folder), make_data())
    first, second = recorder.metrics
    assert 0 <= first["publish/echo"] < 1e-4 and first["publish/echo_s"] > 0
    (line,) = [text for text in caplog.messages if text.startswith("weight check")]
    assert "at version 0" in line and f"took {first['publish/echo_s']:.3f} s" in line
    assert second["publish/echo_s"] == first["publish/echo_s"]  # not asked again
    assert sync._weight_check is not None and not sync._weight_check._agreed
    sync = sdp.WeightSyncCallback(weight_check_tolerance=1e9)
    assert lengths_asked_for(sync, model_folder) == [64]
    assert lengths_asked_for(sdp.WeightSyncCallback(weight_check_every=0), model_folder) == []


@pytest.mark.parametrize("why", ["it scores no text.", "no server scores a prompt: 404"])
def test_a_run_goes_on_with_an_engine_that_scores_no_text_and_says_so_once(
    why: str, model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(tokens: IntArray) -> FloatArray:
        raise sdp.EngineError(why)

    engine = FakeEngine(prompt_logprobs=refuse if "404" in why else None)
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(weight_check_every=1), recorder, max_steps=2)
    with caplog.at_level("INFO", "sdp_lightning.lightning.weight_check"):
        trainer.fit(make_module(model_folder), make_data(engine=engine))
    assert len(recorder.steps) == 2 and "publish/echo" not in recorder.metrics[1]
    assert [text for text in caplog.messages if "not checked" in text] == [
        f"the engine is not checked against the trainer: {why}"
    ]


class OffByHalf(sdp.SegmentWisePPOModule):
    """Its scores are not those of its model."""

    def score(self, trajectories: Any) -> list[list[FloatArray]]:
        return [[part - np.float32(0.5) for part in parts] for parts in super().score(trajectories)]


def test_a_fit_whose_trainer_scores_wrongly_names_the_trainer(model_folder: str) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    with pytest.raises(sdp.EngineError, match=r"embedded answers .* the trainer is wrong\. "):
        trainer.fit(OffByHalf(model_folder), make_data())


def lengths_asked_for(sync: Callback, folder: str) -> list[int]:
    """Tokens of every text that a fit of 5 steps asks its engine for."""
    lengths: list[int] = []

    def remember(tokens: IntArray) -> FloatArray:
        lengths.append(tokens.size)
        return np.zeros(tokens.size - 1, dtype=np.float32)

    data = make_data(engine=FakeEngine(prompt_logprobs=remember))
    make_trainer(sync, max_steps=5).fit(make_module(folder), data)
    return lengths


FORMER_CONFIG = """
callback:
  class_path: sdp_lightning.WeightSyncCallback
  init_args: {echo_every: 2, echo_tolerance: 1.0e+9}
"""


def test_a_config_with_the_former_names_goes_on_and_names_the_new_ones(model_folder: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    config = parser.parse_string(FORMER_CONFIG)
    with (
        pytest.warns(FutureWarning, match="echo_every .* is now weight_check_every"),
        pytest.warns(FutureWarning, match="echo_tolerance .* is now weight_check_tolerance"),
    ):
        sync = parser.instantiate(config).callback
    assert lengths_asked_for(sync, model_folder) == [64] * 4


@pytest.mark.fault("corrupted data", "publish")
def test_a_fit_through_an_engine_with_other_weights_ends_before_the_first_batch(
    model_folder: str,
) -> None:
    engine = FakeEngine(prompt_logprobs=logprobs_of(tiny_model(seed=9)))
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    with pytest.raises(sdp.EngineError, match=r"fake answers a text of 64 .* the engine is wrong"):
        trainer.fit(make_module(model_folder), make_data(engine=engine))
    assert engine.num_requests == 0


def test_settings_out_of_range_are_refused():
    with pytest.raises(sdp.ConfigError, match=r"weight_check_every must be 1 or more, .*; got -1"):
        sdp.WeightSyncCallback(weight_check_every=-1)
    with pytest.raises(sdp.ConfigError, match="weight_check_tolerance must be positive"):
        sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=0.0)
