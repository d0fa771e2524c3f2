"""Completions of a known staleness: sampled from a history of weights, no threads, no clock.

The same seed gives the same prompts, random numbers and lags to every method, whose runs are
therefore pairs. Shapes: G groups, R answers, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from staleness.net import TinyLlama
from staleness.task import Row, Task
from staleness.tree import Tree
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sdp_lightning.training.batch import Batch, collate
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

Staleness = Literal["whole", "mixed"]


def lags_of_tokens(
    staleness: Staleness, lag: int, num_tokens: int, generator: torch.Generator
) -> list[int]:
    """How old each token of a trajectory is, [T], never rising: it starts ``lag`` versions back.

    ``"whole"``: all tokens are. ``"mixed"``: weights change at random places under the trajectory,
    which half of its age was sampled in and half waited: lags k, 3k/4, k/2, or k and k/2 below 4.
    """
    if staleness == "whole":
        return [lag] * num_tokens
    steps = [lag, lag - lag // 4, lag // 2] if lag >= 4 else [lag, lag // 2]
    places = 1 + torch.randperm(num_tokens - 1, generator=generator)[: len(steps) - 1]
    cuts = [0, *sorted(places.tolist()), num_tokens]
    return [steps[i] for i in range(len(steps)) for _ in range(cuts[i], cuts[i + 1])]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What was sampled for one training step.

    Args:
        rows: G prompts with their answers.
        prompts: [G, P].
        answers: [G, R, T] token ids, 0 after the end.
        lengths: [G, R] sampled tokens, the stop included.
        behavior: [G, R, T] log-probs b.
        versions: [T] that sampled each place.
    """

    rows: list[Row]
    prompts: Tensor
    answers: Tensor
    lengths: Tensor
    behavior: Tensor
    versions: list[int]

    @property
    def sampled(self) -> Tensor:
        """[G, R, T] bool."""
        return torch.arange(len(self.versions)) < self.lengths[..., None]

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(first place, place after the last, version) of every run of equal versions."""
        starts = [0, *(t for t in range(1, len(self.versions)) if self._changes(t))]
        ends = [*starts[1:], len(self.versions)]
        return [(a, b, self.versions[a]) for a, b in zip(starts, ends, strict=True)]

    def _changes(self, place: int) -> bool:
        return self.versions[place] != self.versions[place - 1]

    def rewards(self, task: Task) -> Tensor:
        """[G, R]."""
        texts = [
            [task.decode(answer[:n]) for answer, n in zip(answers, lengths, strict=True)]
            for answers, lengths in zip(self.answers.tolist(), self.lengths.tolist(), strict=True)
        ]
        pairs = zip(texts, self.rows, strict=True)
        return torch.tensor([[task.judge(text, row) for text in group] for group, row in pairs])


class History:
    """Every version of the weights of one run, and a net to look through them.

    Args:
        reader: takes on the weights of a version.
        engine_bits: of the mantissa of the engine's weights; None is all.
        num_kept: versions that are kept, the newest; None is all.

    Attributes:
        version: the newest one.
    """

    def __init__(
        self, reader: TinyLlama, engine_bits: int | None = None, num_kept: int | None = None
    ) -> None:
        self._reader, self._weights, self.version = reader, dict[int, Tensor](), -1
        self._engine_bits, self._num_kept = engine_bits, num_kept

    def append(self, net: TinyLlama) -> None:
        """Commit the next version."""
        self.version += 1
        self._weights[self.version] = parameters_to_vector(net.parameters()).detach()  # a copy
        if self._num_kept is not None:
            self._weights.pop(self.version - self._num_kept, None)

    def at(self, version: int) -> TinyLlama:
        """The net of a version as the trainer has it, valid until the next call."""
        return self._with(self._weights[version])

    def engine(self, version: int) -> TinyLlama:
        """The net of a version as the engine has it, valid until the next call."""
        weights = self._weights[version]
        return self._with(
            weights if self._engine_bits is None else rounded(weights, self._engine_bits)
        )

    def _with(self, weights: Tensor) -> TinyLlama:
        vector_to_parameters(weights, self._reader.parameters())
        return self._reader


def rounded(values: Tensor, bits: int) -> Tensor:
    """The nearest values with ``bits`` bits of mantissa, the leading one included."""
    mantissa, exponent = values.frexp()
    return (mantissa * 2**bits).round().div(2**bits).ldexp(exponent)


@torch.no_grad()
def sample(
    history: History, task: Task, rows: list[Row], lags: Sequence[int], uniforms: Tensor
) -> Rollouts:
    """Sample groups, each token from the version ``lags`` says, with a KV cache of that version.

    Args:
        history: versions up to the present.
        task: tokens of prompts, and where answers end.
        rows: G prompts.
        lags: [T], of each place; a version before the first is the first.
        uniforms: [G, R, T] random numbers, one a token.
    """
    versions = [max(0, history.version - lag) for lag in lags]
    prompts = task.encode([row["prompt"] for row in rows])
    groups, num_answers, budget = uniforms.shape
    answers = torch.zeros(uniforms.shape, dtype=torch.long)
    behavior, lengths = torch.zeros(uniforms.shape), torch.zeros(groups, num_answers).long()
    alive = torch.ones(groups, num_answers, dtype=torch.bool)
    net = history.engine(versions[0])
    inputs, cache = net.inputs(prompts), net.new_cache(groups)
    for place in range(budget):
        changed = place == 0 or versions[place] != versions[place - 1]
        net = history.engine(versions[place])
        start = 0 if changed else net.layout.end(place - 1)
        tree = Tree(net.layout, answers[:, :, : place + 1])  # of the next token only what is before
        real = tree.real(alive[..., None].expand(-1, -1, place))
        read = inputs(answers[:, :, :place], tree, real)[:, start:]
        hidden = net.hidden(read, real[:, start:], tree.bias(place), start=start, cache=cache)
        column = tree.before()[:, :, place] - start
        state, which = _different(column, alive)
        logprobs = net.logits(hidden[state]).log_softmax(-1)
        chosen = _chosen(logprobs, which, uniforms[:, :, place][alive])
        answers[:, :, place][alive] = chosen
        behavior[:, :, place][alive] = logprobs[which, chosen]
        lengths += alive
        alive[alive.clone()] = ~task.ends[chosen]
        if not alive.any():
            break
    return Rollouts(rows, prompts, answers, lengths, behavior, versions)


def _different(column: Tensor, alive: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Groups and columns [n] of the states that predict for those alive; [N] which one for each."""
    group = torch.arange(len(column))[:, None].expand_as(column)
    pairs = torch.stack([group[alive], column[alive]])
    states, which = pairs.unique(dim=1, return_inverse=True)
    return (states[0], states[1]), which


def _chosen(logprobs: Tensor, which: Tensor, uniform: Tensor) -> Tensor:
    """[N] tokens: where the cumulated probabilities pass the random number.

    Args:
        logprobs: [n, V] of different states.
        which: [N] the state of each.
        uniform: [N] random numbers.
    """
    cumulated = logprobs.exp().cumsum(-1)[which]
    threshold = (uniform * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0].clamp(
        max=logprobs.shape[1] - 1
    )


@torch.no_grad()
def segment_scores(history: History, rollouts: Rollouts) -> list[Tensor | None]:
    """[G, R, T] q of each segment under the version after its own; None where no score is due.

    That is a lag of 0 or 1: the version after it is the trainer's present one, or not there yet.
    """
    scores: list[Tensor | None] = []
    for start, end, version in rollouts.segments:
        if history.version - version < 2:
            scores.append(None)
            continue
        place = torch.arange(len(rollouts.versions))
        wanted = rollouts.sampled & (place >= start) & (place < end)
        net = history.at(version + 1)
        scores.append(net.logprobs(rollouts.prompts, rollouts.answers, wanted))
    return scores


def to_batch(
    rollouts: Rollouts, scores: Sequence[Tensor | None], version: int, task: Task
) -> Batch:
    """The library's trajectories, collated by it.

    Args:
        rollouts: what was sampled.
        scores: of its segments; empty for a method that reads none.
        version: that trains.
        task: gives rewards.
    """
    scores = scores or [None] * len(rollouts.segments)
    rewards = rollouts.rewards(task).tolist()
    arrays = rollouts.answers.numpy(), rollouts.behavior.numpy(), rollouts.lengths.tolist()
    tables = [None if score is None else score.numpy() for score in scores]
    groups: list[TrajectoryGroup] = []
    for g, prompt in enumerate(rollouts.prompts.numpy()):
        members: list[Trajectory] = []
        for r, reward in enumerate(rewards[g]):
            answer, behavior, length = (array[g][r] for array in arrays)
            parts: list[Context | Segment] = [Context(prompt)]
            for (start, end, own), table in zip(rollouts.segments, tables, strict=True):
                if start >= length:
                    break
                end = min(end, length)
                segment = Segment(own, answer[start:end], behavior[start:end])
                if table is not None:
                    segment.proximal.set(table[g, r, start:end], own + 1)
                parts.append(segment)
            members.append(Trajectory(tuple(parts), reward=reward))
        groups.append(TrajectoryGroup(tuple(members)))
    return collate(groups, version=version)
