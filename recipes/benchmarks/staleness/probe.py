"""Bias and variance of the estimators' gradients, on the same old samples under the same weights.

One run goes by one method. At some of its steps many batches of the same age are drawn anew, each
method takes its gradient of each, at the weights of the step's start and without a step, and all
are held against the policy gradient of fresh samples of the present policy, uncorrected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from staleness.methods import METHODS, Method
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


def probe(
    this: Run, steps: Sequence[int], *, num_batches: int, num_fresh: int
) -> Iterator[dict[str, Any]]:
    """A line for each method at each of ``steps`` of a run, whose own method must read scores."""
    for step in range(max(steps) + 1):
        if step in steps:
            for name, found in compare(this, step, num_batches, num_fresh).items():
                yield {**asdict(this.cell), "method": name, "step": step, **vars(found)}
        this.step(step)


def compare(this: Run, step: int, num_batches: int, num_fresh: int) -> dict[str, Gradients]:
    """Every method on ``num_batches`` old batches, against ``num_fresh`` fresh ones."""
    fresh = [this.rollouts(step, stream=500 + i) for i in range(num_fresh)]
    present = [renewed(this, rollouts) for rollouts in fresh]
    target = torch.stack([gradient(this, this.batch(r), FRESH)[0] for r in present])
    old = [this.rollouts(step, stream=1 + i) for i in range(num_batches)]
    scored = [this.batch(r) for r in old]
    found = {
        name: summed_up([gradient(this, batch, method) for batch in scored], target)
        for name, method in METHODS.items()
        if not method.scale_lr_by_ess  # which changes no gradient
    }
    for name, present_baseline in (("old baseline", False), ("present baseline", True)):
        whole = [(sequence_gradient(this, batch, present_baseline), 1.0) for batch in scored]
        found[f"sequence weights, {name}"] = summed_up(whole, target)
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


def summed_up(found: Sequence[tuple[Tensor, float]], fresh: Tensor) -> Gradients:
    """The mean and spread of gradients against fresh ones [n, D], noise of both taken off.

    Squared lengths of means are of products of different batches, which have no noise in common.
    """
    each = torch.stack([values for values, _ in found])
    truth = fresh.mean(0)
    truth_square, square = _square_of_mean(fresh), _square_of_mean(each)
    along = each @ truth
    own = each.square().sum(1).mean()
    return Gradients(
        cosine_of_mean=float(along.mean() / (truth_square * square).clamp(min=1e-30).sqrt()),
        cosine=float((along / each.norm(dim=1).clamp(min=1e-30)).mean() / truth_square.sqrt()),
        length=float(along.mean() / truth_square),
        noise=float((own - square).clamp(min=0).sqrt() / truth_square.sqrt()),
        acting=sum(acting for _, acting in found) / len(found),
    )


def _square_of_mean(each: Tensor) -> Tensor:
    """[] squared length of the mean that rows [n, D] are drawn around, without bias."""
    count = len(each)
    total = each.sum(0).square().sum() - each.square().sum()
    return (total / (count * (count - 1))).clamp(min=1e-30)
