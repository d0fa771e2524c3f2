"""One run: the tiny task, one method, one staleness, one seed.

The update is the module's own (:class:`~sdp_lightning.training.update.PolicyUpdate`), on a cheaper
forward pass; a test compares the weights after it with the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from staleness.measures import StepSums, success
from staleness.methods import ON_REAL_MODELS, Method
from staleness.net import TinyLlama
from staleness.policies import Shared, tempered_exponent
from staleness.rollouts import (
    History,
    Rollouts,
    Staleness,
    lags_of_tokens,
    sample,
    segment_scores,
    to_batch,
)
from staleness.task import SORTING, Row, Task
from torch import Tensor

from sdp_lightning.config import OptimizerConfig, UpdateConfig
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.forward import SequenceLogprobs
from sdp_lightning.training.policy.logprob_runner import MicroBatch
from sdp_lightning.training.policy.optimizer import make_optimizer
from sdp_lightning.training.update import PolicyUpdate, TrainingLoop


@dataclass(frozen=True)
class Cell:
    """What one run is.

    Args:
        method: a name in ON_REAL_MODELS.
        staleness: whole trajectories ``lag`` versions old, or mixed ones that start so.
        lag: of the first token, from step ``lag`` on; before, the weights are not that old.
        minibatches: optimizer steps a batch.
        seed: of prompts, random numbers and cuts.
        rate: what the learning rate of the recipe is multiplied with.
        engine_bits: of the mantissa of the weights that sample; None: they are the trainer's.
        task: what is learned.
    """

    method: str
    staleness: Staleness
    lag: int
    minibatches: int = 2
    seed: int = 0
    rate: float = 1.0
    engine_bits: int | None = None
    task: str = "sorting"


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
    num_trained: int = 0  # prompts of the training that are judged, too


class NetForward:
    """Log-probs of the tiny net, computed only where an update needs them.

    Args:
        net: the policy.
        every_row: compute x also for rows without an advantage: learning rates are scaled by it.
        is_engine_exact: the engine samples with the trainer's weights, so that a token of lag 0
            has x from its sampling.
    """

    def __init__(self, net: TinyLlama, *, every_row: bool, is_engine_exact: bool = True) -> None:
        self._net, self._every_row, self._is_engine_exact = net, every_row, is_engine_exact

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] x, or b in rows whose advantages are 0: they have no gradient."""
        proximal = batch.behavior_logprobs.clone()
        rows = list(range(len(batch))) if self._every_row else acting_rows(batch)
        if rows and (int(batch.lags.max()) or not self._is_engine_exact):
            with torch.no_grad():
                fresh = policy_logprobs(self._net, batch.select(rows))
            is_own = (batch.lags[rows] == 0) & self._is_engine_exact
            proximal[rows] = torch.where(is_own, proximal[rows], fresh)
        return proximal

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """The rows with an advantage; one whole group if there is none."""
        rows = acting_rows(batch) or list(range(self._net.layout.num_answers))
        return [MicroBatch(batch.select(rows), rows)]

    def __call__(self, piece: MicroBatch) -> SequenceLogprobs:
        """One forward pass; the entropy, which nothing here reads, is 0."""
        logprobs = policy_logprobs(self._net, piece.batch)
        return SequenceLogprobs(logprobs, torch.zeros_like(logprobs))


class Learner:
    """The policy that is trained, and its optimizer.

    Args:
        net: where it starts.
        cell: what it learns with.
        scale: of the run.
    """

    def __init__(self, net: TinyLlama, cell: Cell, scale: Scale) -> None:
        self.net = net
        self.method = ON_REAL_MODELS[cell.method]
        by_ess, exact = self.method.scale_lr_by_ess, cell.engine_bits is None
        optimizer = OptimizerConfig(lr=cell.rate * scale.learning_rate, scale_lr_by_ess=by_ess)
        update = UpdateConfig(num_minibatches=cell.minibatches, max_skipped_in_a_row=1)
        self.forward = NetForward(self.net, every_row=by_ess, is_engine_exact=exact)
        self.update = PolicyUpdate(self.method.loss, optimizer, update)
        self._optimizer, self._schedule = make_optimizer(
            self.net.parameters(), optimizer, max_steps=scale.num_steps * cell.minibatches
        )

    def learn(self, batch: Batch) -> StepSums:
        """One batch, as the module's ``training_step``."""
        sums = StepSums()
        loop = training_loop(self.net, self.forward, self._optimizer, self._schedule, sums.add)
        batch = prepare(self.update, self.forward, batch, self.method)
        if self.method.least_ess is not None:
            sums.note_exponent(self.update.loss.bridge_exponent)
        for values in self.update.train(batch, loop):
            sums.note(values)
        return sums


def training_loop(
    net: TinyLlama, forward: NetForward, optimizer: Any, schedule: Any, observe: Callable[..., None]
) -> TrainingLoop:
    """One process and plain torch around an update."""
    return TrainingLoop(net, forward, optimizer, schedule, RankSums(torch.device("cpu")), observe)


def prepare(update: PolicyUpdate, forward: NetForward, batch: Batch, method: Method) -> Batch:
    """The batch with advantages and, unless the method does without, x under the present weights.

    x is also computed where one step follows, which else takes it from its own pass: methods that
    are equal at a lag are so bit by bit. The loss of ``update`` gets the exponent of a tempered
    bridge.
    """
    batch = update.prepare(batch, forward)
    if method.loss.proximal == "recompute" and batch.proximal_logprobs is None:
        batch = replace(batch, proximal_logprobs=forward.logprobs(batch))
    if not method.corrected:
        assert batch.proximal_logprobs is not None
        batch = replace(batch, behavior_logprobs=batch.proximal_logprobs)
    if method.least_ess is not None:
        exponent = tempered_exponent(batch, method.least_ess)
        update.loss = replace(method.loss, bridge_exponent=exponent)
    return batch


def acting_rows(batch: Batch) -> list[int]:
    """Indices of the rows of groups with advantages; the others have no gradient."""
    assert batch.advantages is not None
    groups = batch.group_ids[batch.advantages[:, -1] != 0]
    return torch.isin(batch.group_ids, groups).nonzero()[:, 0].tolist()


def policy_logprobs(net: TinyLlama, batch: Batch) -> Tensor:
    """[B, T] log-probs of the sampled tokens, equal to those of ``sequence_logprobs``."""
    layout = net.layout
    missing = layout.prompt_length + layout.max_new_tokens - batch.input_ids.shape[1]
    ids = torch.nn.functional.pad(batch.input_ids, (0, missing))
    mask = torch.nn.functional.pad(batch.loss_mask, (0, missing))
    ids, mask = (tensor.view(-1, layout.num_answers, tensor.shape[1]) for tensor in (ids, mask))
    first = layout.prompt_length
    own = net.logprobs(ids[:, 0, :first], ids[:, :, first:], mask[:, :, first:])
    whole = torch.nn.functional.pad(own.flatten(0, 1), (first, 0))
    return whole[:, : batch.input_ids.shape[1]]


@dataclass
class Course:
    """What a run leaves: evaluated exactly at ``steps``, the rest step by step."""

    steps: list[int] = field(default_factory=list[int])
    success: list[float] = field(default_factory=list[float])
    trained: list[float] = field(default_factory=list[float])
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
        task: what is learned.
        shared: what this run has in common with others of the same model, task and scale.
    """

    def __init__(
        self,
        model: Any,
        cell: Cell,
        scale: Scale,
        task: Task = SORTING,
        shared: Shared | None = None,
    ) -> None:
        self.task, self._shared = task, shared or Shared(model, task, scale.group_size)
        self.cell, self.scale, self.method = cell, scale, ON_REAL_MODELS[cell.method]
        nets = self._shared.nets
        self.learner = Learner(nets.policy(), cell, scale)
        self.history = History(nets.policy(), cell.engine_bits, num_kept=cell.lag + 2)
        self.history.append(self.learner.net)
        self._tester = nets.tester()

    def rollouts(self, step: int, stream: int = 0) -> Rollouts:
        """What step ``step`` trains on; a ``stream`` above 0 is another draw of the same age."""
        seed = (self.cell.seed * 10_000 + step) * 1_000 + stream
        generator = torch.Generator().manual_seed(seed)
        layout, known = self.learner.net.layout, self.task.train_rows
        index = torch.randperm(len(known), generator=generator)[: self.scale.num_groups]
        shape = self.scale.num_groups, self.scale.group_size, layout.max_new_tokens
        uniforms = torch.rand(shape, generator=generator)
        lags = lags_of_tokens(self.cell.staleness, self.cell.lag, layout.max_new_tokens, generator)
        rows = [known[i] for i in index.tolist()]

        def draw() -> Rollouts:
            return sample(self.history, self.task, rows, lags, uniforms)

        if stream or self.history.version > min(lags):
            return draw()
        return self._shared.rollouts((seed, *lags, self.cell.engine_bits), draw)

    def batch(self, rollouts: Rollouts) -> Batch:
        """Collated, with the scores that the method reads."""
        needed = self.method.loss.needs_segment_scores
        scores = segment_scores(self.history, rollouts) if needed else ()
        return to_batch(rollouts, scores, self.history.version, self.task)

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
        return self._chance(self.task.test_rows[: self.scale.num_tests])

    def evaluate_trained(self) -> float:
        """The same over the first prompts of the training."""
        return self._chance(self.task.train_rows[: self.scale.num_trained])

    def _chance(self, rows: Sequence[Row]) -> float:
        weights = torch.nn.utils.parameters_to_vector(self.learner.net.parameters()).detach()
        torch.nn.utils.vector_to_parameters(weights, self._tester.parameters())
        return float(success(self._tester, self.task, rows).mean())


def run(
    model: Any, cell: Cell, scale: Scale, task: Task = SORTING, shared: Shared | None = None
) -> Course:
    """Train, and evaluate every few steps and at the end."""
    this, course, total = Run(model, cell, scale, task, shared), Course(), StepSums()
    for step in range(scale.num_steps + 1):
        if step % scale.evaluate_every == 0 or step == scale.num_steps:
            course.steps.append(step)
            course.success.append(this.evaluate())
            if scale.num_trained:
                course.trained.append(this.evaluate_trained())
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
        **({"trained": [round(value, 5) for value in course.trained]} if course.trained else {}),
        "sampled": [round(value, 4) for value in course.sampled],
        "max_lag": max(course.max_lags),
        **{name: round(value, 6) for name, value in course.measures.items()},
    }
