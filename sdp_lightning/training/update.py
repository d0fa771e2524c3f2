"""Training on one consumed batch: its optimizer steps, without Lightning and without rollouts.

A batch is prepared once: reference and proximal log-probs, where they need a forward, and the
advantages. Each of its minibatches is then one optimizer step, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdp_lightning.config import LossConfig, OptimizerConfig, UpdateConfig
from sdp_lightning.config.compatibility import check_objective
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import loss_denominator
from sdp_lightning.objective.effective_sample_size import effective_share, ess_scale
from sdp_lightning.training.batch import Batch, split_minibatches, tokens_of_samples
from sdp_lightning.training.loss import (
    BatchLoss,
    batch_advantages,
    batch_loss,
    reject_by_second_moment,
)
from sdp_lightning.training.metrics.sums import drift_moments
from sdp_lightning.training.policy.forward import SequenceLogprobs
from sdp_lightning.training.policy.gradient_step import GradientStep
from sdp_lightning.training.policy.logprob_runner import MicroBatch, add_idle
from sdp_lightning.training.policy.optimizer import optimizer_kind


class PolicyForward(Protocol):
    """Log-probs of one policy: of whole batches without gradient, of micro-batches with it."""

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] under the present weights, without gradient; 0 outside the loss mask."""
        ...

    def cut(self, batch: Batch) -> Sequence[MicroBatch]:
        """One or more micro-batches with every row of ``batch`` that has a gradient."""
        ...

    def __call__(self, piece: MicroBatch) -> SequenceLogprobs:
        """One forward pass. Carries the gradient."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingLoop:
    """What the surrounding training loop gives to an update.

    Args:
        policy: its trainable parameters are updated.
        forward: log-probs of the policy.
        optimizer: steps the parameters.
        schedule: sets the learning rates of ``optimizer``; None leaves them.
        sums: sums over the ranks that train together.
        observe: takes each micro-batch, its loss, and the entropy of its tokens.
        backward: adds the gradients of a loss.
        sync: context of the backward pass of a micro-batch; told whether it is the step's last,
            after which gradients are reduced over ranks.
        extra: a further loss of a minibatch, [], whose gradients are added; None leaves it out.
    """

    policy: nn.Module
    forward: PolicyForward
    optimizer: Any
    schedule: Any
    sums: RankSums
    observe: Callable[[Batch, BatchLoss, Tensor], object]
    backward: Callable[[Tensor], object] = Tensor.backward
    sync: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext()
    extra: Callable[[Batch], Tensor | None] | None = None


class PolicyUpdate:
    """Updates a policy, batch by batch.

    Args:
        loss: the objective.
        optimizer: gradient clipping, and whether the effective sample size scales learning rates.
        update: minibatches, epochs, advantages.

    Raises:
        ConfigError: if ``update`` and ``loss`` contradict each other, or the optimizer is unknown.
    """

    def __init__(self, loss: LossConfig, optimizer: OptimizerConfig, update: UpdateConfig) -> None:
        check_objective(update, loss)
        optimizer_kind(optimizer)
        self.loss, self.optimizer, self.update = loss, optimizer, update
        self._step = GradientStep(optimizer.gradient_clip_val, update.max_skipped_in_a_row)
        self._shuffler = torch.Generator().manual_seed(0)

    def prepare(
        self,
        batch: Batch,
        forward: PolicyForward,
        reference: Callable[[Batch], Tensor] | None = None,
        *,
        sums: RankSums | None = None,
    ) -> Batch:
        """The batch with all that its optimizer steps share. A collective.

        Args:
            batch: one consumed batch of this rank.
            forward: log-probs of the policy, before its first step on the batch.
            reference: [B, T] log-probs of the reference policy; required if ``loss`` needs it.
            sums: sums over the ranks that train together; None is this process alone.

        Raises:
            ConfigError: if the advantages need named rewards and there are none.
        """
        sums = sums or RankSums(batch.rewards.device)
        if self.loss.needs_reference:
            assert reference is not None
            batch = replace(batch, reference_logprobs=reference(batch))
        batch = replace(batch, advantages=batch_advantages(batch, self.loss, self.update, sums))
        if self.update.mask_truncated:
            batch = batch.without_truncated()
        several_steps = self.update.steps_per_batch > 1 and self.loss.proximal == "recompute"
        if several_steps or self.loss.second_moment_cap is not None:
            batch = replace(batch, proximal_logprobs=forward.logprobs(batch))
        return batch

    def train(self, batch: Batch, loop: TrainingLoop) -> list[dict[str, Tensor]]:
        """All optimizer steps on a prepared batch, and the values that each gives to be logged.

        There are as many minibatches as groups if no rank has more; a rank that has still fewer
        computes idle rows.

        Raises:
            SDPError: after too many steps in a row whose gradient was not finite.
        """
        steps: list[dict[str, Tensor]] = []
        pieces = min(self.update.num_minibatches, batch.most_groups or self.update.num_minibatches)
        mine = min(pieces, int(batch.group_ids.unique().numel()))
        number = pieces * self.update.num_epochs
        for _ in range(self.update.num_epochs):
            minibatches = split_minibatches(
                batch.group_ids, mine, generator=None if number == 1 else self._shuffler
            )
            for rows in [*minibatches, *[[]] * (pieces - mine)]:
                minibatch = batch.select(rows) if rows else batch.idle()
                steps.append(self._optimizer_step(minibatch, loop, len(steps) / number))
        return steps

    def _optimizer_step(
        self, batch: Batch, loop: TrainingLoop, share_done: float
    ) -> dict[str, Tensor]:
        loop.optimizer.zero_grad()
        values, moments = self.add_gradients(batch, loop, share_done)
        scale = 1.0
        if self.optimizer.scale_lr_by_ess:
            scale = ess_scale(effective_share(*loop.sums.add_up(moments)).item())
            values["lr_scale"] = torch.tensor(scale, dtype=torch.float32)
        return values | self._step(loop.optimizer, loop.schedule, scale=scale)

    def add_gradients(
        self, batch: Batch, loop: TrainingLoop, share_done: float = 0.0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of one optimizer step. A collective.

        Args:
            batch: one minibatch of this rank, prepared.
            loop: the surrounding loop.
            share_done: share of the batch's optimizer steps already made, in [0, 1).

        Returns:
            Values to be logged, each [], and :func:`drift_moments` of this rank's tokens, [3].
        """
        if self.loss.second_moment_cap is not None:
            batch = reject_by_second_moment(batch, self.loss.second_moment_cap, loop.sums)
        batch = replace(batch, sample_tokens=tokens_of_samples(batch))
        pieces, size = loop.forward.cut(batch), loop.sums.size
        share = float(loss_denominator(batch.loss_mask, self.loss, batch.sample_ids))
        counts = loop.sums.table(share, batch.num_tokens, len(pieces))
        denominator, num_tokens, _ = map(sum, zip(*counts, strict=True))
        pieces = add_idle(pieces, int(max(number for *_, number in counts)))
        device = batch.loss_mask.device
        extra = _add_extra(batch, loop)
        total, kl = torch.zeros(2, dtype=torch.float32, device=device)
        known = batch.proximal_logprobs  # also of rows that no micro-batch has
        moments = torch.zeros(3, dtype=torch.float64, device=device)
        if known is not None:
            moments = drift_moments(batch, known)
        for number, piece in enumerate(pieces, 1):
            output = loop.forward(piece)
            result = batch_loss(
                output.logprobs,
                piece.batch,
                config=self.loss,
                denominator=denominator,
                share_done=share_done,
            )
            loop.observe(piece.batch, result, output.entropy)
            # Gradients are averaged over ranks, and the loss is a share of the global sum.
            loss = result.loss * size
            with loop.sync(number == len(pieces)):
                loop.backward(loss)
            total += loss.detach()
            kl += result.kl.sum() * size / max(num_tokens, 1)
            if known is None:
                moments += drift_moments(piece.batch, result.proximal)
        values = {"loss": total, "kl": kl} if self.loss.needs_reference else {"loss": total}
        return values | extra, moments


def _add_extra(batch: Batch, loop: TrainingLoop) -> dict[str, Tensor]:
    """Add the gradients of the extra loss of a minibatch, before those that are reduced over ranks.

    Raises:
        ConfigError: if it is not one number that depends on a parameter.
    """
    if loop.extra is None:
        return {}
    loss = loop.extra(batch)
    if loss is None:
        return {"extra_loss": torch.zeros((), dtype=torch.float32)}
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"one of shape {list(loss.shape)}, requires_grad={loss.requires_grad}"
        raise ConfigError(
            f"extra_loss() must return one number with a gradient, or None; got {found}."
        )
    with loop.sync(False):
        loop.backward(loss)
    return {"extra_loss": loss.detach().float().reshape(())}
