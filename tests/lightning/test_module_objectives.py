"""The module under the whole family of objectives, on batches made by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.logprob_runner import LogprobRunner
from support.steps import (
    advantages,
    assert_same,
    gradients_of,
    make_batch,
    plain_logprobs,
    segment_proximal,
    train,
)
from support.trainers import Judge

CONFIGS = {
    "cispo": {"surrogate": "cispo", "trust_region": "behavior"},
    "gspo": {"ratio_level": "sequence", "trust_region": "behavior", "aggregation": "sequence"},
    "tis": {
        "trust_region": "proximal",
        "correction": "truncate",
        "rejection_on": "weight",
        "behavior_weight_cap": 1.05,
    },
    "sequence mask": {
        "trust_region": "proximal",
        "rejection_on": "weight",
        "rejection_level": "sequence",
        "behavior_weight_cap": 1.2,
    },
    "behavior mask": {"trust_region": "proximal", "behavior_mask": True, "clip_epsilon": 0.05},
    "dr grpo": {"aggregation": "constant", "aggregation_length": 9},
    "log-linear segments": {"segment_proximal": "loglinear"},
}


def loss_by_hand(
    policy: Any, batch: Batch, config: sdp.LossConfig, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The policy loss in one piece, with its graph, and n."""
    target = plain_logprobs(policy, batch)
    x = target.detach() if x is None else x
    q, b = segment_proximal(batch, x), batch.behavior_logprobs
    if config.segment_proximal == "loglinear":
        q = torch.where(batch.lags <= 1, x, b + (x - b) / batch.lags.clamp(min=1))
    mask = batch.loss_mask if batch.rejected is None else batch.loss_mask & ~batch.rejected
    count = float(batch.loss_mask.sum()) if batch.rejected is not None else None
    loss = sdp.segment_wise_ppo_loss(
        target, x, q, b, advantages(batch), mask, config=config, num_tokens=count
    ).loss
    return loss, target


def gradient_by_hand(policy: Any, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return gradients_of(policy)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_every_objective_is_the_one_computed_by_hand_in_any_microbatches(
    model_folder: str, settings: dict[str, Any], max_tokens: int
) -> None:
    batch, config = make_batch(model_folder), sdp.LossConfig(**settings)
    update = sdp.UpdateConfig(max_tokens_per_microbatch=max_tokens)
    _, recorder = train(model_folder, batch, loss=config, update=update)
    policy = Judge(model_folder).model
    loss, _ = loss_by_hand(policy, batch, config)
    assert recorder.metrics["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert_same(recorder.gradients[0], gradient_by_hand(policy, loss))


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_the_second_moment_is_bounded_over_the_whole_step(
    model_folder: str, max_tokens: int
) -> None:
    cap = 0.01
    config = sdp.LossConfig(
        surrogate="unclipped", trust_region="behavior", second_moment_cap=cap, rejection_on="drift"
    )
    batch = make_batch(model_folder)
    update = sdp.UpdateConfig(max_tokens_per_microbatch=max_tokens)
    _, recorder = train(model_folder, batch, loss=config, update=update)
    policy = Judge(model_folder).model
    drift = plain_logprobs(policy, batch).detach() - batch.behavior_logprobs
    moving = batch.loss_mask & (drift * advantages(batch) > 0)
    kept: list[tuple[int, int]] = []
    total = 0.0
    for square, row, column in sorted(
        (float(drift[i, j] ** 2), int(i), int(j)) for i, j in moving.nonzero()
    ):
        total += square
        if total / (len(kept) + 1) > cap:
            break
        kept.append((row, column))
    assert 0 < len(kept) < int(moving.sum())
    rejected = moving.clone()
    for place in kept:
        rejected[place] = False
    loss, _ = loss_by_hand(policy, replace(batch, rejected=rejected), config)
    assert_same(recorder.gradients[0], gradient_by_hand(policy, loss))
    assert recorder.metrics["loss/rejected_fraction"] == pytest.approx(
        float(rejected.sum() / batch.loss_mask.sum()), abs=1e-6
    )


def test_loglinear_proximals_take_no_forward_and_follow_the_steps_done(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LogprobRunner, batch: Batch) -> Tensor:
        raise AssertionError("a forward without a gradient")

    monkeypatch.setattr(LogprobRunner, "logprobs", refuse)
    batch = make_batch(model_folder)
    config = sdp.LossConfig(trust_region="proximal", proximal="loglinear")
    update = sdp.UpdateConfig(num_epochs=3)
    _, recorder = train(model_folder, batch, loss=config, update=update)
    policy, b, lags = Judge(model_folder).model, batch.behavior_logprobs, batch.lags
    steps = zip(recorder.weights, recorder.gradients, strict=True)
    for number, (weights, gradients) in enumerate(steps):
        policy.load_state_dict(weights)
        done = number / 3
        n = plain_logprobs(policy, batch).detach()
        x = n if number == 0 else b + (n - b) * lags / (lags + done)
        assert_same(gradients, gradient_by_hand(policy, loss_by_hand(policy, batch, config, x)[0]))


# The reference -----------------------------------------------------------------------------------


def two_steps(model_folder: str, config: sdp.LossConfig, **update: Any) -> Any:
    """Two batches with large steps: in the second one the policy has left the reference."""
    first, second = make_batch(model_folder), make_batch(model_folder, (2, 3))
    optimizer = sdp.OptimizerConfig(lr=3e-2, gradient_clip_val=None)
    model, recorder = train(
        model_folder,
        first,
        second,
        loss=config,
        optimizer=optimizer,
        update=sdp.UpdateConfig(**update),
    )
    reference, policy = Judge(model_folder).model, copy.deepcopy(Judge(model_folder).model)
    policy.load_state_dict(recorder.weights[1])
    with torch.no_grad():
        ref = plain_logprobs(reference, second)
    return model, recorder, second, policy, ref


@pytest.mark.parametrize("estimator", ["k2", "k3", "weighted_k3"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_kl_in_the_loss_pulls_towards_the_weights_of_the_start(
    model_folder: str, estimator: Any, aggregation: Any
) -> None:
    tokens: Any = "all" if estimator == "k2" else "kept"
    config = sdp.LossConfig(
        kl_coefficient=0.7,
        kl_estimator=estimator,
        kl_tokens=tokens,
        aggregation=aggregation,
        clip_epsilon=0.1,
    )
    model, recorder, batch, policy, ref = two_steps(
        model_folder, config, max_tokens_per_microbatch=40
    )
    loss, n = loss_by_hand(policy, batch, config)
    d = torch.where(batch.loss_mask, ref - n, 0.0)
    kl = d.square() / 2 if estimator == "k2" else d.exp() - 1 - d
    if estimator == "weighted_k3":
        kl = (n - batch.behavior_logprobs).exp() * kl  # the gradient of the weight is followed
    assert recorder.metrics["train/kl"] == pytest.approx(
        float(kl.detach().sum() / batch.loss_mask.sum()), rel=1e-4
    )
    kept = batch.loss_mask & ((n - batch.behavior_logprobs).exp() <= config.behavior_weight_cap)
    assert 0 < int(kept.sum()) < int(batch.loss_mask.sum())
    if tokens == "kept":
        kl = torch.where(kept, kl, 0.0)
    if aggregation == "sequence":
        mean = (kl.sum(1) / batch.loss_mask.sum(1)).mean()
    else:
        mean = kl.sum() / batch.loss_mask.sum()
    whole = loss + 0.7 * mean
    assert float(mean.detach()) > 1e-3
    assert recorder.metrics["train/loss"] == pytest.approx(float(whole.detach()), abs=1e-4)
    assert_same(recorder.gradients[1], gradient_by_hand(policy, whole), atol=1e-4)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(policy.parameters())), "the reference is part of the module"


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_kl_in_the_reward_is_taken_off_before_the_advantages(
    model_folder: str, estimator: Any
) -> None:
    config = sdp.LossConfig(kl_coefficient=0.2, kl_estimator=estimator, kl_in="reward")
    _, recorder, batch, policy, ref = two_steps(model_folder, config)
    d = torch.where(batch.loss_mask, ref - batch.behavior_logprobs, 0.0)
    kl = -d if estimator == "k1" else d.exp() - 1 - d
    assert kl.sum(1).abs().max() > 1e-2
    penalised = replace(batch, rewards=batch.rewards - 0.2 * kl.sum(1))
    loss, _ = loss_by_hand(policy, penalised, config)
    assert_same(recorder.gradients[1], gradient_by_hand(policy, loss), atol=1e-4)
    assert recorder.metrics["train/reward"] == pytest.approx(float(batch.rewards.mean()), abs=1e-6)


def test_without_a_kl_there_is_no_reference(model_folder: str) -> None:
    _, recorder = train(model_folder, make_batch(model_folder))
    assert "train/kl" not in recorder.metrics
