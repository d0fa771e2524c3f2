"""What the module does with its metrics: it scales learning rates and warns."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.training.batch import Batch
from support.steps import make_batch, train

LR = 1e-3


def drifted(folder: str, nats: float) -> Batch:
    """A batch of which every third token was so much less likely when it was sampled."""
    batch = make_batch(folder, (14, 14, 15))
    third = (torch.arange(batch.loss_mask.shape[1]) % 3 == 0) & batch.loss_mask
    behavior = batch.behavior_logprobs - nats * third
    return replace(batch, behavior_logprobs=behavior)


def optimizer(**settings: bool) -> sdp.OptimizerConfig:
    return sdp.OptimizerConfig(lr=LR, gradient_clip_val=None, **settings)


def test_the_learning_rate_is_scaled_by_the_root_of_the_effective_sample_size(
    model_folder: str,
) -> None:
    batch = drifted(model_folder, 3.0)
    _, recorder = train(model_folder, batch, optimizer=optimizer(scale_lr_by_ess=True))
    share = recorder.metrics["ess/token"]
    assert 0 < share < 0.8, "the case is too easy"
    assert recorder.rates == [pytest.approx(LR * share**0.5, rel=1e-5)]
    assert recorder.metrics["train/lr_scale"] == pytest.approx(share**0.5, rel=1e-5)
    assert recorder.metrics["train/lr"] == pytest.approx(LR * share**0.5, rel=1e-5)


def test_each_step_has_the_scale_of_its_own_minibatch(model_folder: str) -> None:
    """Only the last batch has drifted: the scale does not outlive its step."""
    calm, wild = drifted(model_folder, 0.0), drifted(model_folder, 6.0)
    update = sdp.UpdateConfig(num_minibatches=2)
    _, recorder = train(
        model_folder, wild, calm, update=update, optimizer=optimizer(scale_lr_by_ess=True)
    )
    first, second, *later = recorder.rates
    assert max(first, second) < 0.8 * LR
    assert first != second
    assert min(later) > max(first, second)
    assert recorder.metrics["train/lr_scale"] == pytest.approx(sum(later) / len(later) / LR)


def test_the_scale_of_a_second_minibatch_leaves_the_first_out(model_folder: str) -> None:
    _, recorder = train(
        model_folder,
        drifted(model_folder, 3.0),
        update=sdp.UpdateConfig(num_minibatches=2),
        optimizer=optimizer(scale_lr_by_ess=True),
    )
    of_both = LR * recorder.metrics["ess/token"] ** 0.5
    assert len(recorder.rates) == 2
    assert all(abs(rate / of_both - 1) > 1e-3 for rate in recorder.rates)


def test_unless_asked_for_the_learning_rate_is_as_set(model_folder: str) -> None:
    _, recorder = train(model_folder, drifted(model_folder, 3.0), optimizer=optimizer())
    assert recorder.rates == [LR]
    assert "train/lr_scale" not in recorder.metrics


def test_a_run_warns_once_of_what_is_wrong(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    wild = drifted(model_folder, 6.0)
    with caplog.at_level(logging.WARNING, logger="sdp_lightning"):
        train(model_folder, wild, wild, wild)
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "left out of the loss" in text]) == 1


def test_a_bridge_is_warned_of_where_it_is_left_out(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(model_folder, (14, 14, 15))
    old = replace(
        batch,
        versions=torch.where(batch.loss_mask, batch.version - 2, -1),
        segment_scored=batch.loss_mask,
        segment_logprobs=torch.where(batch.loss_mask, batch.behavior_logprobs - 1.0, 0.0),
    )
    for exponent in (1.0, 0.0):
        loss = sdp.LossConfig(
            trust_region="proximal", bridge_exponent=exponent, rejection_on="weight"
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sdp_lightning"):
            train(model_folder, old, loss=loss)
        said = [record.getMessage() for record in caplog.records]
        assert any("the bridge at lag 2" in text for text in said) == (exponent == 0.0)
