"""Bias and variance of the estimators' gradients, on the same old samples under the same weights.

One run goes by one method. At some of its steps many batches of the same age are drawn anew, each
method takes its gradient of each, at the weights of the step's start and without a step, and all
are held against the policy gradient of fresh samples of the present policy, uncorrected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from staleness.methods import METHODS, ON_REAL_MODELS, Method
from staleness.net import TinyLlama
from staleness.rollouts import Rollouts, sample
from staleness.training import (
    NetForward,
    Run,
    acting_rows,
    policy_logprobs,
    prepare,
    training_loop,
)
from torch import Tensor

from sdp_lightning.config import OptimizerConfig, UpdateConfig
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import BatchLoss
from sdp_lightning.training.update import PolicyUpdate

FRESH, FRESH_WEIGHTS = METHODS["uncorrected"], METHODS["proximal"]


@dataclass(frozen=True)
class Gradients:
    """What one method's gradients are like, against the fresh one's.

    Args:
        cosine_of_mean: of the mean over batches: 1 is no bias of direction.
        cosine: of a single batch's, mean over batches.
        length: of the mean, along the fresh gradient, as a share of its length: 1 is no bias there.
        noise: standard deviation of a batch's gradient, as a share of the fresh one's length.
        acting: share of tokens with an advantage that have a gradient.
    """

    cosine_of_mean: float
    cosine: float
    length: float
    noise: float
    acting: float


class GradientSums:
    """Sums over gradients [D], of which one at a time is held."""

    def __init__(self) -> None:
        self._total, self._squares, self._count = torch.zeros(()), 0.0, 0

    def add(self, gradient: Tensor) -> None:
        self._total = self._total + gradient
        self._squares += float(gradient.square().sum())
        self._count += 1

    @property
    def mean(self) -> Tensor:
        """[D] the mean."""
        return self._total / self._count

    @property
    def mean_square(self) -> float:
        """Mean squared length."""
        return self._squares / self._count

    @property
    def square_of_mean(self) -> float:
        """Squared length of the mean that they are drawn around, without bias.

        It is of products of different gradients, which have no noise in common.
        """
        products = float(self._total.square().sum()) - self._squares
        return max(products / (self._count * (self._count - 1)), 1e-30)


def probe(
    this: Run,
    steps: Sequence[int],
    *,
    num_batches: int,
    num_fresh: int,
    methods: Iterable[str] = METHODS,
) -> Iterator[dict[str, Any]]:
    """A line for each method at each of ``steps`` of a run, whose own method must read scores."""
    names = [name for name in methods if not ON_REAL_MODELS[name].scale_lr_by_ess]  # an equal one
    for step in range(max(steps) + 1):
        if step in steps:
            for name, found in compare(this, step, num_batches, num_fresh, names).items():
                yield {**asdict(this.cell), "method": name, "step": step, **vars(found)}
        this.step(step)


def compare(
    this: Run, step: int, num_batches: int, num_fresh: int, methods: Iterable[str]
) -> dict[str, Gradients]:
    """Every method on ``num_batches`` old batches, against ``num_fresh`` fresh ones."""
    fresh = GradientSums()
    for i in range(num_fresh):
        present = renewed(this, this.rollouts(step, stream=500 + i))
        fresh.add(gradient(this, this.batch(present), FRESH)[0])
    old = [this.batch(this.rollouts(step, stream=1 + i)) for i in range(num_batches)]
    found = {
        name: summed_up((gradient(this, batch, ON_REAL_MODELS[name]) for batch in old), fresh)
        for name in methods
    }
    for name, present_baseline in (("old baseline", False), ("present baseline", True)):
        whole = ((sequence_gradient(this, batch, present_baseline), 1.0) for batch in old)
        found[f"sequence weights, {name}"] = summed_up(whole, fresh)
    return found


def renewed(this: Run, rollouts: Rollouts) -> Rollouts:
    """Other answers to the same prompts, sampled by the present policy."""
    generator = torch.Generator().manual_seed(int(rollouts.behavior.abs().sum() * 1e4))
    uniforms = torch.rand(rollouts.answers.shape, generator=generator)
    return sample(this.history, this.task, rollouts.rows, [0] * len(rollouts.versions), uniforms)


def gradient(this: Run, batch: Batch, method: Method) -> tuple[Tensor, float]:
    """(gradient of the loss of a whole batch at the step's start, share of tokens that act)."""
    net = this.learner.net
    net.zero_grad()
    update, forward = make_update(net, method)
    shares: list[float] = []

    def observe(part: Batch, result: BatchLoss, entropy: Tensor) -> None:
        policy, has_advantage = result.policy, part.advantages != 0
        frozen = policy.clipped if method.loss.surrogate != "cispo" else policy.clipped & False
        acting = (policy.kept & ~frozen & has_advantage).sum()
        shares.append(float(acting / part.loss_mask.sum()))

    prepared = prepare(update, forward, batch, method)
    update.add_gradients(prepared, training_loop(net, forward, None, None, observe))
    return flat_gradient(net), sum(shares)


def make_update(net: TinyLlama, method: Method) -> tuple[PolicyUpdate, NetForward]:
    """One step on a whole batch by a method, and the forward that it takes."""
    return PolicyUpdate(method.loss, OptimizerConfig(), UpdateConfig()), NetForward(
        net, every_row=method.scale_lr_by_ess
    )


def sequence_gradient(this: Run, batch: Batch, present_baseline: bool) -> Tensor:
    """The policy gradient, corrected by the weight exp(sum of x - b) of whole sequences.

    Short answers allow what long ones do not. With ``present_baseline`` the mean and deviation of a
    group's rewards are weighed likewise, as those of the present policy's samples: nothing is left
    of the old policy.
    """
    net = this.learner.net
    net.zero_grad()
    prepared = prepare(*make_update(net, FRESH_WEIGHTS), batch, FRESH_WEIGHTS)
    part = prepared.select(acting_rows(prepared))
    assert part.advantages is not None and part.proximal_logprobs is not None
    drift = torch.where(part.loss_mask, part.proximal_logprobs - part.behavior_logprobs, 0.0)
    members = drift.sum(1).view(-1, net.layout.num_answers)
    weight = members.softmax(1) * net.layout.num_answers  # of mean 1 in a group
    advantage = part.advantages[:, -1].view_as(weight)
    if present_baseline:
        reward = part.rewards.view_as(weight)
        mean = (weight * reward).mean(1, keepdim=True)
        spread = (weight * (reward - mean).square()).mean(1, keepdim=True).sqrt()
        advantage = (reward - mean) / (spread + 1e-6)
    factor = (weight * advantage).flatten()[:, None]
    loss = -(factor * policy_logprobs(net, part)).sum() / prepared.loss_mask.sum()
    loss.backward()
    return flat_gradient(net)


def flat_gradient(net: TinyLlama) -> Tensor:
    """[D] of all weights."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).clone()


def summed_up(found: Iterable[tuple[Tensor, float]], fresh: GradientSums) -> Gradients:
    """The mean and spread of gradients against fresh ones, noise of both taken off."""
    truth, each = fresh.mean, GradientSums()
    along, cosines, acting = list[float](), list[float](), list[float]()
    for values, share in found:
        each.add(values)
        along.append(float(values @ truth))
        cosines.append(along[-1] / max(float(values.norm()), 1e-30))
        acting.append(share)
    square, mean_along = fresh.square_of_mean, fmean(along)
    noise = max(each.mean_square - each.square_of_mean, 0.0)
    return Gradients(
        cosine_of_mean=mean_along / math.sqrt(square * each.square_of_mean),
        cosine=fmean(cosines) / math.sqrt(square),
        length=mean_along / square,
        noise=math.sqrt(noise / square),
        acting=fmean(acting),
    )
