"""What is measured of policies and of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from staleness.net import TinyLlama
from staleness.task import Row, Task
from staleness.tree import Tree
from torch import Tensor

from sdp_lightning.objective.kl import kl_estimate
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import BatchLoss

PER_STEP = ("grad_norm", "lr_scale")


@torch.no_grad()
def success(net: TinyLlama, task: Task, rows: Sequence[Row]) -> Tensor:
    """[n] the chance that a sample of the policy is right, by the chain rule: nothing is sampled.

    Rows are taken together with others whose answers are as long.

    Args:
        net: its layout has one answer a group.
        task: tokens of prompts and answers, and where answers end.
        rows: prompts with answers.
    """
    found = torch.zeros(len(rows))
    answers = [task.encode([row["answer"]])[0] for row in rows]
    for length in {len(answer) for answer in answers}:
        index = [i for i, answer in enumerate(answers) if len(answer) == length]
        prompts = task.encode([rows[i]["prompt"] for i in index])
        own = torch.stack([answers[i] for i in index])
        tree = Tree(net.layout, own[:, None])
        real = tree.real(torch.ones_like(own[:, None], dtype=torch.bool))
        read = net.inputs(prompts)(own[:, None], tree, real)
        hidden = net.hidden(read, real, tree.bias(length))
        logprobs = net.logits(hidden[:, prompts.shape[1] - 1 :]).log_softmax(-1)
        digits = logprobs[:, :-1].gather(-1, own[..., None])[..., 0].sum(-1)
        ends = logprobs[:, -1, task.ends].logsumexp(-1)
        found[index] = (digits + ends).exp()
    return found


@dataclass
class StepSums:
    """Sums over tokens that have an advantage, and over optimizer steps."""

    sums: dict[str, float] = field(default_factory=dict[str, float])
    tokens: float = 0.0
    steps: float = 0.0
    exponents: list[float] = field(default_factory=list[float])

    def add(self, batch: Batch, result: BatchLoss, entropy: Tensor) -> None:
        """Add the tokens of one micro-batch."""
        assert batch.advantages is not None
        mask, policy = batch.loss_mask & (batch.advantages != 0), result.policy
        behavior, proximal = batch.behavior_logprobs, result.proximal
        log_drift = torch.where(mask, proximal - behavior, 0.0)
        bridge = torch.where(mask, proximal - result.segment, 0.0)
        away = log_drift * torch.sign(batch.advantages)
        values = {
            "clipped_high": mask & policy.clipped & (policy.log_ratio > 0),
            "clipped_low": mask & policy.clipped & (policy.log_ratio < 0),
            "rejected": mask & ~policy.kept,
            "abs_drift": log_drift.abs(),
            "kl_drift": kl_estimate(behavior, proximal, mask, "k3"),
            "abs_bridge": bridge.abs(),
            "moved_with_advantage": mask & (away > 0.1823),
            "weight": torch.where(policy.kept & mask, policy.log_weight.exp(), 0.0),
            "mean_lag": torch.where(mask, batch.lags, 0),
        }
        self.tokens += float(mask.sum())
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Add one optimizer step: the values that it gave, a scale of 1 unless it gave another."""
        self.steps += 1
        for name in PER_STEP:
            value = float(values[name]) if name in values else 1.0
            self.sums[name] = self.sums.get(name, 0.0) + value

    def note_exponent(self, exponent: float) -> None:
        """Add the exponent of the bridge that was chosen for a batch."""
        self.exponents.append(exponent)

    def means(self) -> dict[str, float]:
        """Means over tokens, over optimizer steps, or over batches."""
        chosen = {"exponent": sum(self.exponents) / len(self.exponents)} if self.exponents else {}
        return chosen | {
            name: value / max(self.steps if name in PER_STEP else self.tokens, 1)
            for name, value in self.sums.items()
        }

    def __add__(self, other: StepSums) -> StepSums:
        names = {*self.sums, *other.sums}
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        counts = self.tokens + other.tokens, self.steps + other.steps
        return StepSums(sums, *counts, [*self.exponents, *other.exponents])
