"""One run: the tiny task, one method, one staleness, one seed.

The step is the module's own (``SegmentWisePPOModule.training_step``), on a cheaper forward pass; a
test holds the weights after it to the module's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from staleness.measures import StepSums, success
from staleness.methods import METHODS, Method
from staleness.net import Layout, TinyLlama
from staleness.rollouts import (
    History,
    Rollouts,
    Staleness,
    lags_of_tokens,
    sample,
    segment_scores,
    to_batch,
)
from staleness.task import Judge, judge, test_rows, train_rows
from torch import Tensor

from sdp_lightning.config import OptimizerConfig
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.objective import group_relative_advantages, loss_denominator
from sdp_lightning.objective.effective_sample_size import effective_share, ess_scale
from sdp_lightning.training.batch import Batch, split_minibatches
from sdp_lightning.training.loss import BatchLoss, batch_loss, within_second_moment
from sdp_lightning.training.policy.gradient_step import GradientStep
from sdp_lightning.training.policy.optimizer import make_optimizer

NO_RANKS = RankSums(torch.device("cpu"))


@dataclass(frozen=True)
class Cell:
    """What one run is.

    Args:
        method: a name in METHODS.
        staleness: whole trajectories ``lag`` versions old, or mixed ones that start so.
        lag: of the first token, from step ``lag`` on; before, the weights are not that old.
        minibatches: optimizer steps a batch.
        seed: of prompts, random numbers and cuts.
        rate: what the learning rate of the recipe is multiplied with.
        engine_bits: of the mantissa of the weights that sample; None: they are the trainer's.
    """

    method: str
    staleness: Staleness
    lag: int
    minibatches: int = 2
    seed: int = 0
    rate: float = 1.0
    engine_bits: int | None = None


@dataclass(frozen=True)
class Scale:
    """How long and wide runs are; the same for all that are compared."""

    num_steps: int = 48
    num_groups: int = 16
    group_size: int = 8
    learning_rate: float = 1.5e-4
    evaluate_every: int = 4
    num_final: int = 3  # evaluations that the final reward is the mean of
    num_tests: int = 128


class Learner:
    """The policy that is trained, and its optimizer.

    Args:
        model: where it starts.
        cell: what it learns with.
        scale: of the run.
    """

    def __init__(self, model: Any, cell: Cell, scale: Scale) -> None:
        self.net = TinyLlama(model, Layout(num_answers=scale.group_size))
        self.method, self._minibatches = METHODS[cell.method], cell.minibatches
        self._is_engine_exact = cell.engine_bits is None
        config = OptimizerConfig(
            lr=cell.rate * scale.learning_rate, scale_lr_by_ess=self.method.scale_lr_by_ess
        )
        self._optimizer, self._schedule = make_optimizer(
            self.net.parameters(), config, max_steps=scale.num_steps * cell.minibatches
        )
        self._step = GradientStep(config.gradient_clip_val, max_skipped=1)
        self._shuffler = torch.Generator().manual_seed(0)

    def learn(self, batch: Batch) -> StepSums:
        """One batch, as ``training_step``: what its minibatches share, then each of them."""
        batch = prepare(self.net, batch, self.method, is_engine_exact=self._is_engine_exact)
        sums = StepSums()
        minibatches = split_minibatches(
            batch.group_ids,
            self._minibatches,
            generator=self._shuffler if self._minibatches > 1 else None,
        )
        for number, rows in enumerate(minibatches):
            self._optimizer_step(batch.select(rows), number / self._minibatches, sums)
        return sums

    def _optimizer_step(self, batch: Batch, share_done: float, sums: StepSums) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        part, found = minibatch_loss(self.net, batch, self.method, share_done)
        scale = 1.0
        if found is not None:
            found.loss.backward()
            sums.add(part, found)
        if self.method.scale_lr_by_ess:
            scale = _ess_scale(batch)
        result = self._step(self.net, self._optimizer, self._schedule, scale=scale)
        sums.note(result["grad_norm"].item(), scale)


def policy_logprobs(net: TinyLlama, batch: Batch) -> Tensor:
    """[B, T] of the sampled tokens, as ``sequence_logprobs`` gives them."""
    layout = net.layout
    missing = layout.prompt_length + layout.max_new_tokens - batch.input_ids.shape[1]
    ids = torch.nn.functional.pad(batch.input_ids, (0, missing))
    mask = torch.nn.functional.pad(batch.loss_mask, (0, missing))
    ids, mask = (tensor.view(-1, layout.num_answers, tensor.shape[1]) for tensor in (ids, mask))
    first = layout.prompt_length
    own = net.logprobs(ids[:, 0, :first], ids[:, :, first:], mask[:, :, first:])
    whole = torch.nn.functional.pad(own.flatten(0, 1), (first, 0))
    return whole[:, : batch.input_ids.shape[1]]


def prepare(net: TinyLlama, batch: Batch, method: Method, *, is_engine_exact: bool = True) -> Batch:
    """Advantages and x, under the present weights.

    A token of lag 0 takes x from its sampling, if the same weights gave it. Groups whose rewards
    are equal have advantage 0 and no gradient; nothing is computed for them, save what the learning
    rate is scaled by.
    """
    per_row = group_relative_advantages(batch.rewards, batch.group_ids)
    batch = replace(batch, advantages=per_row[:, None].expand(batch.loss_mask.shape))
    proximal = batch.behavior_logprobs.clone()
    rows = (
        (per_row != 0).nonzero()[:, 0] if not method.scale_lr_by_ess else torch.arange(len(batch))
    )
    if len(rows) and (int(batch.lags.max()) or not is_engine_exact):
        with torch.no_grad():
            fresh = policy_logprobs(net, batch.select(rows.tolist()))
        is_own = (batch.lags[rows] == 0) & is_engine_exact
        proximal[rows] = torch.where(is_own, proximal[rows], fresh)
    if not method.corrected:
        batch = replace(batch, behavior_logprobs=proximal)
    needed = method.loss.proximal == "recompute"
    return replace(batch, proximal_logprobs=proximal if needed else None)


def minibatch_loss(
    net: TinyLlama, batch: Batch, method: Method, share_done: float
) -> tuple[Batch, BatchLoss | None]:
    """The rows that have a gradient, and their share of the loss; None if no row has one."""
    assert batch.advantages is not None
    if method.loss.second_moment_cap is not None:
        batch = within_second_moment(batch, method.loss.second_moment_cap, NO_RANKS)
        assert batch.advantages is not None
    denominator = float(loss_denominator(batch.loss_mask, method.loss))
    part = batch.select((batch.advantages[:, -1] != 0).nonzero()[:, 0].tolist())
    if not len(part):
        return part, None
    target = policy_logprobs(net, part)
    found = batch_loss(
        target, part, config=method.loss, denominator=denominator, share_done=share_done
    )
    return part, found


def _ess_scale(batch: Batch) -> float:
    assert batch.proximal_logprobs is not None
    drift = (batch.proximal_logprobs - batch.behavior_logprobs)[batch.loss_mask]
    weight = drift.double().clamp(-20, 20).exp()
    count = torch.tensor(weight.numel())
    return ess_scale(effective_share(count, weight.sum(), weight.square().sum()).item())


@dataclass
class Course:
    """What a run leaves: evaluated exactly at ``steps``, the rest step by step."""

    steps: list[int] = field(default_factory=list[int])
    success: list[float] = field(default_factory=list[float])
    sampled: list[float] = field(default_factory=list[float])
    max_lags: list[int] = field(default_factory=list[int])
    mismatches: list[float] = field(default_factory=list[float])
    measures: dict[str, float] = field(default_factory=dict[str, float])

    def final(self, count: int) -> float:
        """Mean of the last evaluations."""
        return sum(self.success[-count:]) / count


class Run:
    """A cell while it is computed.

    Args:
        model: the warm model.
        cell: what is run.
        scale: how long and wide.
        judge: gives rewards.
    """

    def __init__(self, model: Any, cell: Cell, scale: Scale, judge: Judge = judge) -> None:
        self._judge = judge
        self.cell, self.scale, self.method = cell, scale, METHODS[cell.method]
        self.learner = Learner(model, cell, scale)
        reader = TinyLlama(model, Layout(num_answers=scale.group_size))
        self.history = History(reader, cell.engine_bits)
        self.history.append(self.learner.net)
        self._tester = TinyLlama(model, Layout(num_answers=1, max_new_tokens=8))

    def rollouts(self, step: int, stream: int = 0) -> Rollouts:
        """What step ``step`` trains on; a ``stream`` above 0 is another draw of the same age."""
        seed = (self.cell.seed * 10_000 + step) * 1_000 + stream
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(train_rows), generator=generator)[: self.scale.num_groups]
        layout = self.learner.net.layout
        shape = self.scale.num_groups, self.scale.group_size, layout.max_new_tokens
        uniforms = torch.rand(shape, generator=generator)
        lags = lags_of_tokens(self.cell.staleness, self.cell.lag, layout.max_new_tokens, generator)
        return sample(self.history, [train_rows[i] for i in index.tolist()], lags, uniforms)

    def batch(self, rollouts: Rollouts) -> Batch:
        """Collated, with the scores that the method reads."""
        needed = self.method.loss.needs_segment_scores
        scores = segment_scores(self.history, rollouts) if needed else ()
        return to_batch(rollouts, scores, self.history.version, self._judge)

    def step(self, step: int) -> tuple[Batch, StepSums]:
        """Sample, learn, commit."""
        batch = self.batch(self.rollouts(step))
        sums = self.learner.learn(batch)
        self.history.append(self.learner.net)
        return batch, sums

    def mismatch(self, step: int) -> float:
        """Mean abs(log-prob of the trainer - of the engine), same weights, in nats."""
        rollouts = self.rollouts(step)
        total = torch.zeros(())
        for start, end, version in rollouts.segments:
            place = torch.arange(len(rollouts.versions))
            wanted = rollouts.sampled & (place >= start) & (place < end)
            with torch.no_grad():
                own = self.history.at(version).logprobs(rollouts.prompts, rollouts.answers, wanted)
            total = total + ((own - rollouts.behavior) * wanted).abs().sum()
        return float(total / rollouts.sampled.sum())

    def evaluate(self) -> float:
        """Chance of a right answer under the present weights, over the test prompts."""
        weights = torch.nn.utils.parameters_to_vector(self.learner.net.parameters()).detach()
        torch.nn.utils.vector_to_parameters(weights, self._tester.parameters())
        return float(success(self._tester, test_rows[: self.scale.num_tests]).mean())


def run(model: Any, cell: Cell, scale: Scale, judge: Judge = judge) -> Course:
    """Train, and evaluate every few steps and at the end."""
    this, course, total = Run(model, cell, scale, judge), Course(), StepSums()
    for step in range(scale.num_steps + 1):
        if step % scale.evaluate_every == 0 or step == scale.num_steps:
            course.steps.append(step)
            course.success.append(this.evaluate())
        if step == scale.num_steps:
            break
        if cell.engine_bits is not None and step % scale.evaluate_every == 0:
            course.mismatches.append(this.mismatch(step))
        batch, sums = this.step(step)
        course.sampled.append(batch.rewards.mean().item())
        course.max_lags.append(int(batch.lags.max()))
        total = total + sums
    course.measures = total.means()
    if course.mismatches:
        course.measures["mismatch"] = sum(course.mismatches) / len(course.mismatches)
    return course


def record(cell: Cell, scale: Scale, course: Course) -> dict[str, Any]:
    """A line of results."""
    return {
        **{name: value for name, value in asdict(cell).items() if value is not None},
        "final": round(course.final(scale.num_final), 5),
        "steps": course.steps,
        "success": [round(value, 5) for value in course.success],
        "max_lag": max(course.max_lags),
        **{name: round(value, 6) for name, value in course.measures.items()},
    }
