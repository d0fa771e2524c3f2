"""Helpers of the tests of the module: batches made by hand, and what a step on them must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.training.batch import Batch, SealedBatch, collate
from support.trainers import Judge, make_module, make_trainer, weights_of

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


def make_batch(folder: str, sizes: Sequence[int] = (3, 2, 4), *, seed: int = 0) -> Batch:
    groups = [sdp.TrajectoryGroup(tuple(g)) for g in make_trajectories(folder, sizes, seed=seed)]
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
    loss = sdp.segment_wise_ppo_loss(
        target, x, q, b, advantage, mask, config=config, lags=batch.lags
    ).loss
    policy.zero_grad()
    loss.backward()
    return float(loss.detach()), gradients_of(policy)
