"""The module alone, on batches made by hand: no rollouts, no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from fitting import Judge, make_module, make_trainer, weights_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.batch import Batch, SealedBatch, collate
from sdp_lightning.forward import sequence_logprobs

VERSION = 4  # of the trainer


def make_trajectories(
    folder: str, sizes: Sequence[int] = (3, 2, 4), *, seed: int = 0
) -> list[list[sdp.Trajectory]]:
    """Groups that share a prompt, with turns of versions 1 to 4, half scored.

    Behavior log-probs and scores lie within 0.3 nats of those of the saved weights.
    """
    rng, judge = np.random.default_rng(seed), Judge(folder)
    weights = judge.weights()
    groups: list[list[sdp.Trajectory]] = []
    for size in sizes:
        prompt = rng.integers(3, 40, rng.integers(2, 9))
        members: list[sdp.Trajectory] = []
        for _ in range(size):
            parts: list[sdp.Context | sdp.Segment] = [sdp.Context(prompt)]
            for version in range(rng.integers(1, 3), VERSION + 1):
                n = rng.integers(1, 6)
                tokens = rng.integers(3, 40, n)
                parts.append(sdp.Segment(version, tokens, np.zeros(n), 0.8 + 0.1 * version))
                if rng.random() < 0.4:
                    parts.append(sdp.Context(rng.integers(3, 40, 2)))
            draft = sdp.Trajectory(tuple(parts), reward=float(rng.random()))
            members.append(_with_logprobs(draft, judge.segment_logprobs(weights, draft), rng))
        groups.append(members)
    return groups


def _with_logprobs(
    draft: sdp.Trajectory, scores: Sequence[Tensor], rng: np.random.Generator
) -> sdp.Trajectory:
    parts: list[sdp.Context | sdp.Segment] = []
    values = iter(scores)
    for part in draft.parts:
        if isinstance(part, sdp.Segment):
            present = next(values).numpy()
            behavior = np.minimum(present + rng.uniform(-0.3, 0.3, present.size), 0)
            part = sdp.Segment(part.version, part.token_ids, behavior, part.temperature)
            if part.version <= VERSION - 2 and rng.random() < 0.5:
                near = present + rng.uniform(-0.3, 0.3, present.size)
                part.proximal.set(np.minimum(near, 0), part.version + 1)
        parts.append(part)
    return sdp.Trajectory(tuple(parts), reward=draft.reward)


def make_batch(folder: str, sizes: Sequence[int] = (3, 2, 4)) -> Batch:
    groups = [sdp.TrajectoryGroup(tuple(g)) for g in make_trajectories(folder, sizes)]
    return collate(groups, version=VERSION)


class Batches(L.LightningDataModule):
    """Hands out prepared batches as RolloutDataModule does."""

    def __init__(self, *batches: Batch) -> None:
        super().__init__()
        self._batches = batches

    def train_dataloader(self) -> Any:
        return _Sized(self._batches)

    def val_dataloader(self) -> list[Any]:
        return []

    def on_after_batch_transfer(self, batch: SealedBatch, dataloader_idx: int) -> Batch:
        return batch.batch


class _Sized:
    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[SealedBatch]:
        return iter([SealedBatch(batch) for batch in self._batches])


@dataclass(eq=False)
class StepRecorder(Callback):
    """Gradients, weights and learning rate right before every optimizer step."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])
    weights: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])
    rates: list[float] = field(default_factory=list[float])
    batches: list[Batch] = field(default_factory=list[Batch])
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, sdp.SegmentWisePPOModule) and pl_module.policy is not None
        self.weights.append(weights_of(pl_module))
        self.gradients.append(gradients_of(pl_module.policy))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def gradients_of(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def train(
    folder: str,
    *batches: Batch,
    max_steps: int | None = None,
    trainer: dict[str, Any] | None = None,
    **module: Any,
) -> tuple[sdp.SegmentWisePPOModule, StepRecorder]:
    module = {"optimizer": sdp.OptimizerConfig(lr=1e-3, gradient_clip_val=None)} | module
    model, recorder = make_module(folder, **module), StepRecorder()
    steps = len(batches) * model.update.steps_per_batch if max_steps is None else max_steps
    settings = {"limit_val_batches": 0} | (trainer or {})
    make_trainer(recorder, max_steps=steps, **settings).fit(model, Batches(*batches))
    return model, recorder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 100 * atol
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=atol, msg=name)


# By hand ------------------------------------------------------------------------------------------


def plain_logprobs(policy: Any, batch: Batch) -> Tensor:
    """[B, T] row by row, by transformers' own forward."""
    rows: list[Tensor] = []
    for row, length in enumerate(batch.lengths.tolist()):
        logits = policy(input_ids=batch.input_ids[row : row + 1, :length]).logits[0, :-1]
        table = (logits / batch.temperatures[row, 1:length, None]).log_softmax(-1)
        values = table.gather(1, batch.input_ids[row, 1:length, None])[:, 0]
        rows.append(torch.nn.functional.pad(values, (1, batch.loss_mask.shape[1] - length)))
    return torch.where(batch.loss_mask, torch.stack(rows), 0.0)


def advantages(batch: Batch) -> Tensor:
    """[B, T], rewards standardized within each group by the population's deviation."""
    values = torch.zeros_like(batch.rewards)
    for group in batch.group_ids.unique():
        rewards = batch.rewards[batch.group_ids == group]
        deviation = rewards - rewards.mean()
        values[batch.group_ids == group] = deviation / (rewards.std(correction=0) + 1e-6)
    return values[:, None].expand(batch.loss_mask.shape)


def segment_proximal(batch: Batch, x: Tensor) -> Tensor:
    """[B, T] q: x up to lag 1, else the score, else what stands in."""
    b, lags = batch.behavior_logprobs, batch.lags
    stand_in = {"behavior": b, "decoupled": x, "loglinear": b + (x - b) / lags.clamp(min=1)}
    old = torch.where(
        batch.segment_scored, batch.segment_logprobs, stand_in[batch.missing_proximal]
    )
    return torch.where(lags <= 1, x, old)


def loss_by_hand(
    policy: Any, batch: Batch, config: sdp.LossConfig, x: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    target = plain_logprobs(policy, batch)
    x = target.detach() if x is None else x
    advantage = advantages(batch)
    if batch.max_lag is not None:
        advantage = torch.where(batch.lags > batch.max_lag, 0.0, advantage)
    q = segment_proximal(batch, x)
    mask, b = batch.loss_mask, batch.behavior_logprobs
    loss = sdp.segment_wise_ppo_loss(target, x, q, b, advantage, mask, config=config).loss
    policy.zero_grad()
    loss.backward()
    return float(loss.detach()), gradients_of(policy)


LOSSES = [
    sdp.LossConfig(),
    sdp.LossConfig(trust_region="proximal"),
    sdp.LossConfig(trust_region="proximal", bridge_exponent=0.0, rejection_on="weight"),
    sdp.LossConfig(trust_region="behavior", behavior_weight_cap=1.1, clip_epsilon=0.05),
]


@pytest.mark.parametrize("config", LOSSES, ids=["segment", "proximal", "origin", "behavior"])
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


@pytest.mark.parametrize("layout", ["padded", "shared_prefix", "auto"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_layout_and_microbatches_change_no_gradient(
    model_folder: str, layout: Any, max_tokens: int
) -> None:
    batch = make_batch(model_folder)
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


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_bf16_rounds_neither_logprobs_nor_advantages(
    model_folder: str, precision: str, num_epochs: int
) -> None:
    """Against a loss in float32 over the same forward in bfloat16."""
    batch = make_batch(model_folder, (14, 14, 15))
    assert batch.num_tokens > 256 and batch.num_tokens % 2  # bfloat16 has no such number
    config = sdp.LossConfig(trust_region="behavior")
    update = sdp.UpdateConfig(num_epochs=num_epochs, layout="padded")
    model, recorder = train(
        model_folder, batch, update=update, loss=config, trainer={"precision": precision}
    )
    (seen,) = recorder.batches
    for name in ("behavior_logprobs", "segment_logprobs", "temperatures", "rewards"):
        values, wanted = getattr(seen, name), getattr(batch, name)
        torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    policy: Any = model.policy
    assert policy.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
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


@pytest.mark.parametrize("trainable", [None, r"layers\.1\."])
def test_gradient_checkpointing_is_on_and_changes_no_gradient(
    model_folder: str, trainable: str | None
) -> None:
    batch = make_batch(model_folder)
    model, checkpointed = train(
        model_folder, batch, gradient_checkpointing=True, trainable=trainable
    )
    policy: Any = model.policy
    assert policy.is_gradient_checkpointing and policy.training
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
    assert {name for name, _ in model.named_weights(changed_only=True)} == moved
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
    assert module.policy is not None and module.policy.training
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


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
