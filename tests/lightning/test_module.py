"""The module alone, on batches made by hand: no rollouts, no engine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.steps import (
    advantages,
    assert_same,
    loss_by_hand,
    make_batch,
    make_trajectories,
    plain_logprobs,
    train,
)
from support.trainers import Judge, make_module, weights_of

LOSSES = [
    sdp.LossConfig(),
    sdp.LossConfig(trust_region="past", clip_epsilon=0.05),
    sdp.LossConfig(trust_region="proximal"),
    sdp.LossConfig(trust_region="proximal", bridge_exponent=0.0, rejection_on="weight"),
    sdp.LossConfig(trust_region="behavior", behavior_weight_cap=1.1, clip_epsilon=0.05),
]


@pytest.mark.parametrize(
    "config", LOSSES, ids=["segment", "past", "proximal", "origin", "behavior"]
)
@pytest.mark.parametrize("missing", ["behavior", "loglinear", "decoupled"])
def test_the_module_trains_on_the_loss_computed_by_hand(
    model_folder: str, config: sdp.LossConfig, missing: Any
) -> None:
    batch = replace(make_batch(model_folder), missing_proximal=missing)
    _, recorder = train(model_folder, batch, loss=config)
    loss, gradients = loss_by_hand(Judge(model_folder).model, batch, config)
    assert recorder.metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert_same(recorder.gradients[0], gradients)


def test_tokens_beyond_max_lag_get_weight_0_and_count_in_n(model_folder: str) -> None:
    batch = replace(make_batch(model_folder), max_lag=1)
    assert (batch.lags > 1).any()
    _, recorder = train(model_folder, batch)
    _, gradients = loss_by_hand(Judge(model_folder).model, batch, sdp.LossConfig())
    assert_same(recorder.gradients[0], gradients)
    assert recorder.metrics["train/tokens"] == batch.loss_mask.sum()


@settings(deadline=None, max_examples=6)
@given(
    layout=st.sampled_from(["padded", "packed", "shared_prefix", "auto"]),
    max_tokens=st.integers(1, 150),
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@example(layout="padded", max_tokens=40, sizes=[3, 2, 4], seed=0)
@example(layout="packed", max_tokens=40, sizes=[3, 2, 4], seed=0)
@example(layout="shared_prefix", max_tokens=40, sizes=[3, 2, 4], seed=0)
@example(layout="auto", max_tokens=1, sizes=[3, 2, 4], seed=0)
def test_neither_layout_nor_microbatches_change_the_loss_or_its_gradient(
    model_folder: str, layout: Any, max_tokens: int, sizes: list[int], seed: int
) -> None:
    batch = make_batch(model_folder, sizes, seed=seed)
    update = sdp.UpdateConfig(layout=layout, max_tokens_per_microbatch=max_tokens)
    _, recorder = train(model_folder, batch, update=update)
    loss, gradients = loss_by_hand(Judge(model_folder).model, batch, sdp.LossConfig())
    assert recorder.metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert_same(recorder.gradients[0], gradients)


def test_gradients_of_minibatches_add_up_to_that_of_the_batch(model_folder: str) -> None:
    """Each is a mean over its own tokens; the weights hardly move in between."""
    batch = make_batch(model_folder)
    optimizer = sdp.OptimizerConfig(lr=1e-9, gradient_clip_val=None)
    update = sdp.UpdateConfig(num_minibatches=3)
    _, recorder = train(model_folder, batch, update=update, optimizer=optimizer)
    _, whole = loss_by_hand(Judge(model_folder).model, batch, sdp.LossConfig())
    counts = [int(batch.loss_mask[batch.group_ids == g].sum()) for g in range(3)]
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        shares = [counts[group] / sum(counts) for group in order]
        total = {
            name: sum(s * g[name] for s, g in zip(shares, recorder.gradients, strict=True))
            for name in whole
        }
        if all(torch.allclose(total[name], whole[name], atol=1e-5) for name in whole):
            return
    pytest.fail("in no order of the groups do the minibatches make up the batch")


def test_the_proximal_policy_is_that_of_the_start_in_every_epoch(model_folder: str) -> None:
    batch, config = make_batch(model_folder), sdp.LossConfig()
    optimizer = sdp.OptimizerConfig(lr=1e-2, gradient_clip_val=None)
    update = sdp.UpdateConfig(num_epochs=3)
    _, recorder = train(model_folder, batch, update=update, optimizer=optimizer)
    policy = Judge(model_folder).model
    with torch.no_grad():
        x = plain_logprobs(policy, batch)
    assert len(recorder.gradients) == 3
    for weights, gradients in zip(recorder.weights, recorder.gradients, strict=True):
        policy.load_state_dict(weights)
        assert_same(gradients, loss_by_hand(policy, batch, config, x)[1])


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_bf16_rounds_neither_logprobs_nor_advantages(model_folder: str, num_epochs: int) -> None:
    """Against a loss in float32 over the same forward in bfloat16."""
    batch = make_batch(model_folder, (14, 14, 15))
    assert batch.num_tokens > 256 and batch.num_tokens % 2  # bfloat16 has no such number
    config = sdp.LossConfig(trust_region="behavior")
    update = sdp.UpdateConfig(num_epochs=num_epochs, layout="padded")
    model, recorder = train(
        model_folder, batch, update=update, loss=config, trainer={"precision": "bf16-mixed"}
    )
    (seen,) = recorder.batches
    for name in ("behavior_logprobs", "segment_logprobs", "temperatures", "rewards"):
        values, wanted = getattr(seen, name), getattr(batch, name)
        torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    policy: Any = model.policy
    assert policy.dtype == torch.float32
    losses: list[float] = []
    x = None
    for weights in recorder.weights:
        policy.load_state_dict(weights)
        with torch.no_grad(), model.trainer.precision_plugin.forward_context():
            target = sequence_logprobs(policy, batch).logprobs
        assert target.dtype == torch.float32
        x = target if x is None else x
        b, mask = batch.behavior_logprobs, batch.loss_mask
        result = sdp.segment_wise_ppo_loss(target, x, x, b, advantages(batch), mask, config=config)
        losses.append(float(result.loss))
    assert recorder.metrics["train/loss"] == pytest.approx(sum(losses) / num_epochs, abs=1e-6)
    assert recorder.metrics["drift/abs_log_mean"] == pytest.approx(_drift(batch, x), abs=1e-6)
    assert recorder.metrics["train/tokens"] == batch.num_tokens


def _drift(batch: Batch, x: Tensor | None) -> float:
    assert x is not None
    return float((x - batch.behavior_logprobs)[batch.loss_mask].abs().mean())


def test_16_mixed_is_refused(model_folder: str) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # else Lightning
    with pytest.raises(sdp.ConfigError, match=r"16-mixed.*bf16-mixed"):  # makes it bf16 on CPU
        train(model_folder, make_batch(model_folder), trainer={"plugins": [plugin]})


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@pytest.mark.parametrize("lora", [None, sdp.LoRAConfig(rank=2)], ids=["whole", "adapter"])
def test_half_precision_weights_are_refused(
    model_folder: str, precision: str, lora: sdp.LoRAConfig | None
) -> None:
    """AdamW makes nan of float16 weights, and leaves bfloat16 ones as they are."""
    with pytest.raises(sdp.ConfigError, match=f"'{precision}'.*bf16-mixed"):
        train(model_folder, make_batch(model_folder), lora=lora, trainer={"precision": precision})


@pytest.mark.parametrize("trainable", [None, r"layers\.1\."])
def test_gradient_checkpointing_is_on_and_changes_no_gradient(
    model_folder: str, trainable: str | None
) -> None:
    batch = make_batch(model_folder)
    model, checkpointed = train(
        model_folder, batch, gradient_checkpointing=True, trainable=trainable
    )
    policy: Any = model.policy
    assert all(layer.gradient_checkpointing for layer in policy.model.layers)
    _, plain = train(model_folder, batch, trainable=trainable)
    assert_same(checkpointed.gradients[0], plain.gradients[0], atol=1e-6)


def test_the_gradient_is_clipped_to_its_largest_norm(model_folder: str) -> None:
    batch = make_batch(model_folder)
    _, free = train(model_folder, batch)
    optimizer = sdp.OptimizerConfig(lr=1e-3, gradient_clip_val=0.01)
    _, clipped = train(model_folder, batch, optimizer=optimizer)
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.gradients[0].values()))
    found = math.sqrt(sum(float(g.square().sum()) for g in clipped.gradients[0].values()))
    assert norm > 0.1 and found == pytest.approx(0.01, rel=1e-3)
    assert clipped.metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


COSINE = [0.5 * (1 + math.cos(math.pi * done)) for done in (0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, *COSINE]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    model_folder: str, schedule: Any, factors: list[float]
) -> None:
    optimizer = sdp.OptimizerConfig(lr=1e-3, schedule=schedule, warmup_steps=2)
    batches = [make_batch(model_folder)] * 6
    _, recorder = train(model_folder, *batches, optimizer=optimizer)
    assert recorder.rates == pytest.approx([1e-3 * factor for factor in factors])
    assert recorder.metrics["train/lr"] == pytest.approx(recorder.rates[-1])


def test_a_decay_needs_an_end_after_the_warm_up(model_folder: str) -> None:
    optimizer = sdp.OptimizerConfig(schedule="linear", warmup_steps=1)
    with pytest.raises(sdp.ConfigError, match=r"needs total_steps.*got 1"):
        train(model_folder, make_batch(model_folder), optimizer=optimizer)


def test_only_what_the_regular_expression_finds_is_trained(model_folder: str) -> None:
    batch = make_batch(model_folder)
    model, recorder = train(model_folder, batch, trainable=r"layers\.1\..*proj")
    before, after = Judge(model_folder).weights(), weights_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.1." in name and "proj" in name}
    assert recorder.gradients[0].keys() == moved
    sent = {name for name, _ in model.named_weights(changed_only=True)}
    assert sent == {name for name in before if "layers.1." in name}  # servers fuse within a layer
    assert {name for name, _ in model.named_weights()} == set(before)


def test_an_expression_that_finds_nothing_is_refused(model_folder: str) -> None:
    model = make_module(model_folder, trainable="nothing")
    with pytest.raises(sdp.ConfigError, match=r"trainable='nothing' finds no parameter.*model\."):
        model.configure_model()


@pytest.mark.parametrize(("max_steps", "advice"), [(3, "use 2 or 4"), (1, "use 2")])
def test_max_steps_must_be_a_multiple_of_the_steps_of_a_batch(
    model_folder: str, max_steps: int, advice: str
) -> None:
    update = sdp.UpdateConfig(num_minibatches=2)
    with pytest.raises(sdp.ConfigError, match=f"max_steps={max_steps} is no multiple of 2") as info:
        train(model_folder, make_batch(model_folder), update=update, max_steps=max_steps)
    assert str(info.value).rstrip(".").endswith(advice)


def test_a_module_without_its_model_says_so(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match="configure_model"):
        next(make_module(model_folder).named_weights())


def test_a_model_is_found_through_a_function(model_folder: str, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(f"def tiny():\n    return {model_folder!r}\n")
    module = make_module(f"{tmp_path / 'models.py'}:tiny")
    assert module.model_id == model_folder
    module.configure_model()
    assert module.policy is not None and module.tokenizer.eos_token_id == 1


def test_dropout_is_off_although_the_model_trains(model_folder: str) -> None:
    module = make_module(model_folder, model_kwargs={"attention_dropout": 0.5})
    module.configure_model()
    first, second = (module.score(make_trajectories(model_folder)[0]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_auto_pads_where_rows_cannot_share_a_prefix(model_folder: str) -> None:
    """A state in the configuration: ``"shared_prefix"`` refuses it, ``"auto"`` does without."""
    trajectories, scores = make_trajectories(model_folder)[2], []
    for layout in ("padded", "auto", "shared_prefix"):
        module = make_module(model_folder, update=sdp.UpdateConfig(layout=layout))
        module.configure_model()
        policy: Any = module.policy
        policy.config.layer_types = ["linear_attention"]
        if layout == "shared_prefix":
            with pytest.raises(sdp.ConfigError, match="linear_attention"):
                module.score(trajectories)
        else:
            scores.append([np.concatenate(arrays) for arrays in module.score(trajectories)])
    for padded, auto in zip(*scores, strict=True):
        np.testing.assert_array_equal(padded, auto)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_scores_come_back_in_the_order_asked_for(model_folder: str, max_tokens: int) -> None:
    """Siblings far apart, prefixes of trajectories, several segments: one array for each."""
    a, b, c = make_trajectories(model_folder)
    asked = [a[0], c[1], b[0], a[2], sdp.Trajectory(c[0].parts[:2]), a[1], b[1]]
    update = sdp.UpdateConfig(max_tokens_per_microbatch=max_tokens)
    module, judge = make_module(model_folder, update=update), Judge(model_folder)
    module.configure_model()
    scores = module.score(asked)
    assert len(scores) == len(asked)
    for trajectory, arrays in zip(asked, scores, strict=True):
        expected = judge.segment_logprobs(judge.weights(), trajectory)
        for found, wanted in zip(arrays, expected, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)
