"""Truncated samples left out of the loss: their rewards still count in their groups."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.training.batch import Batch
from support.steps import assert_same, loss_by_hand, make_batch, plain_logprobs, train
from support.trainers import Judge

TRUNCATED = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)  # groups of 3, 2 and 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mean of tokens": {},
    "mean of sequences": {"aggregation": "sequence"},
    "Dr. GRPO": {"aggregation": "constant", "aggregation_length": 9},
    "sequence ratio": {"ratio_level": "sequence", "trust_region": "behavior"},
}


def batch_with(folder: str, truncated: Tensor) -> Batch:
    return replace(make_batch(folder), truncated=truncated)


def masked(batch: Batch) -> Batch:
    return replace(batch, loss_mask=batch.loss_mask & ~batch.truncated[:, None])


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_is_that_of_the_rest_with_the_advantages_of_all(
    model_folder: str, settings: dict[str, Any], layout: Any
) -> None:
    batch, config = batch_with(model_folder, TRUNCATED), sdp.LossConfig(**settings)
    update = sdp.UpdateConfig(mask_truncated=True, layout=layout, max_tokens_per_microbatch=30)
    _, recorder = train(model_folder, batch, loss=config, update=update)
    loss, gradients = loss_by_hand(Judge(model_folder).model, masked(batch), config)
    assert recorder.metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert_same(recorder.gradients[0], gradients)
    assert recorder.metrics["train/masked_truncated"] == 4
    assert recorder.metrics["train/truncated"] == pytest.approx(4 / 9)
    assert recorder.metrics["train/tokens"] == float(masked(batch).loss_mask.sum())
    assert recorder.metrics["train/reward"] == pytest.approx(float(batch.rewards.mean()))


def test_it_is_the_token_mean_of_trl(model_folder: str) -> None:
    """loss_type="dapo": the sum over unmasked tokens over their number, rewards of all in A."""
    config = sdp.LossConfig(trust_region="behavior", behavior_weight_cap=None)
    batch = batch_with(model_folder, TRUNCATED)
    update = sdp.UpdateConfig(mask_truncated=True, group_std="sample")
    _, recorder = train(model_folder, batch, loss=config, update=update)
    groups = [batch.rewards[batch.group_ids == g] for g in range(3)]
    rows = torch.cat([(r - r.mean()) / (r.std() + 1e-6) for r in groups])
    target = plain_logprobs(Judge(model_folder).model, batch).detach()
    ratio = (target - batch.behavior_logprobs).exp()
    value = torch.minimum(ratio * rows[:, None], ratio.clamp(0.8, 1.2) * rows[:, None])
    mask = masked(batch).loss_mask
    expected = -(value * mask).sum() / mask.sum()
    assert recorder.metrics["train/loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_a_batch_of_truncated_samples_alone_has_gradient_0_and_is_warned_of(
    model_folder: str, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loss = sdp.LossConfig(kl_coefficient=0.1, aggregation="sequence")
    optimizer = sdp.OptimizerConfig(lr=1e-3, gradient_clip_val=1.0, scale_lr_by_ess=True)
    update = sdp.UpdateConfig(mask_truncated=True, layout=layout, num_epochs=2, num_minibatches=2)
    batch = batch_with(model_folder, torch.ones(9, dtype=torch.bool))
    with caplog.at_level(logging.WARNING):
        model, recorder = train(model_folder, batch, loss=loss, update=update, optimizer=optimizer)
    assert recorder.metrics["train/masked_truncated"] == 9
    assert recorder.metrics["train/tokens"] == recorder.metrics["train/loss"] == 0
    assert recorder.metrics["train/skipped"] == 0 and len(recorder.gradients) == 4
    assert not any(g.any() for step in recorder.gradients for g in step.values())
    saved = Judge(model_folder).weights()
    assert all(torch.equal(value, saved[name]) for name, value in model.named_weights())
    assert sum("100% of the trajectories are truncated" in text for text in caplog.messages) == 1


def test_without_the_setting_truncated_samples_are_trained_on(model_folder: str) -> None:
    batch = batch_with(model_folder, TRUNCATED)
    _, recorder = train(model_folder, batch)
    _, gradients = loss_by_hand(Judge(model_folder).model, batch, sdp.LossConfig())
    assert_same(recorder.gradients[0], gradients)
    assert recorder.metrics["train/masked_truncated"] == 0
