"""Group filters and length penalties: they shape the groups of a workflow for training only.

A filter drops groups without a learning signal; a penalty lowers rewards by length. Evaluation uses
the workflow itself, unshaped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.prompt_lengths import PromptLength, PromptMeter
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow, Tokenizer


class GroupFilter(ABC):
    """Decides whether a group is left out of training."""

    @abstractmethod
    def why_not(self, trajectories: Sequence[Trajectory]) -> str:
        """Reason why the group is left out, one of a few texts; empty if it is kept."""


@dataclass(frozen=True)
class AllRight(GroupFilter):
    """Leaves out groups whose every reward is ``at_least`` or more: nothing is left to learn.

    Args:
        at_least: the bound.
        reward: name of the one of several rewards that is meant; empty is their sum.
    """

    at_least: float = 1.0
    reward: str = ""

    def why_not(self, trajectories: Sequence[Trajectory]) -> str:
        is_right = all(r >= self.at_least for r in _rewards(trajectories, self.reward))
        return f"every {_named(self.reward)} is {self.at_least:g} or more" if is_right else ""


@dataclass(frozen=True)
class AllWrong(GroupFilter):
    """Leaves out groups whose every reward is ``at_most`` or less: nothing shows what is better.

    Args:
        at_most: the bound.
        reward: name of the one of several rewards that is meant; empty is their sum.
    """

    at_most: float = 0.0
    reward: str = ""

    def why_not(self, trajectories: Sequence[Trajectory]) -> str:
        is_wrong = all(r <= self.at_most for r in _rewards(trajectories, self.reward))
        return f"every {_named(self.reward)} is {self.at_most:g} or less" if is_wrong else ""


@dataclass(frozen=True)
class AllEqual(GroupFilter):
    """Leaves out groups whose rewards differ by ``tolerance`` or less: advantages would be 0.

    Of several rewards each must be equal, and their sum: GDPO learns from each.
    """

    tolerance: float = 0.0

    def why_not(self, trajectories: Sequence[Trajectory]) -> str:
        columns = [_rewards(trajectories, name) for name in ("", *trajectories[0].rewards)]
        is_equal = all(max(column) - min(column) <= self.tolerance for column in columns)
        return "all rewards of the group are equal" if is_equal else ""


def _rewards(trajectories: Sequence[Trajectory], name: str) -> list[float]:
    """The rewards of this name, the sums of several for an empty one."""
    for trajectory in trajectories:
        if name and name not in trajectory.rewards:
            raise RolloutError(
                f"there is no reward named {name!r}; there are {sorted(trajectory.rewards)}."
            )
    return [t.rewards[name] if name else t.reward for t in trajectories]


def _named(name: str) -> str:
    return f"reward {name!r} of the group" if name else "reward of the group"


class LengthPenalty(ABC):
    """A penalty for length, added to the reward of a trajectory."""

    @abstractmethod
    def of(self, trajectory: Trajectory) -> float:
        """The penalty of ``trajectory``: 0 or less, by its sampled tokens."""


@dataclass(frozen=True)
class SoftOverlong(LengthPenalty):
    r"""DAPO's soft overlong punishment: nothing, then a ramp, then ``-scale``.

    .. math:: p(n) = -s \cdot \mathrm{clip}((n - (L - b)) / b, 0, 1)

    Source: Yu et al. 2025, equation 13, https://arxiv.org/abs/2503.14476.

    Args:
        max_tokens: L, sampled tokens at which the penalty is full.
        buffer: b, the tokens before those over which it grows.
        scale: s, the full penalty.

    Raises:
        ConfigError: unless 1 <= buffer <= max_tokens and scale > 0.
    """

    max_tokens: int
    buffer: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_tokens or not self.scale > 0:
            raise ConfigError(
                "SoftOverlong needs 1 <= buffer <= max_tokens and scale > 0; got "
                f"buffer={self.buffer}, max_tokens={self.max_tokens}, scale={self.scale}."
            )

    def of(self, trajectory: Trajectory) -> float:
        over = trajectory.num_sampled - (self.max_tokens - self.buffer)
        return -self.scale * min(max(over / self.buffer, 0.0), 1.0)


@dataclass(frozen=True)
class LinearLength(LengthPenalty):
    """A penalty of ``per_token`` for each token after ``free_tokens``, at most ``at_most``.

    Raises:
        ConfigError: unless per_token > 0, at_most > 0 and free_tokens >= 0.
    """

    per_token: float
    free_tokens: int = 0
    at_most: float = 1.0

    def __post_init__(self) -> None:
        if not (self.per_token > 0 and self.at_most > 0 and self.free_tokens >= 0):
            raise ConfigError(
                "LinearLength needs per_token > 0, at_most > 0 and free_tokens >= 0; got "
                f"{self.per_token}, {self.at_most} and {self.free_tokens}."
            )

    def of(self, trajectory: Trajectory) -> float:
        over = max(0, trajectory.num_sampled - self.free_tokens)
        return -min(self.per_token * over, self.at_most)


@dataclass(frozen=True)
class Truncated(LengthPenalty):
    """A fixed penalty for a trajectory that was cut off at a bound."""

    penalty: float = 1.0

    def of(self, trajectory: Trajectory) -> float:
        return -self.penalty if trajectory.finish_reason == "length" else 0.0


PENALTY = "penalty"  # name of the penalties among several rewards


class ShapedWorkflow(RolloutWorkflow):
    """Filters the groups and shapes the rewards of another workflow, for training only.

    A filtered group is rejected, and its row is not repeated in that epoch: further rows refill the
    batch. ``max_rejected_in_a_row`` of the RolloutConfig bounds their number, with an error that
    names the reason.

    Args:
        workflow: the workflow to shape.
        filters: filters of the unshaped rewards; the first that objects gives the reason.
        penalties: penalties that are added to the rewards after the filters. Of several rewards
            they are one more, ``"penalty"``, with weight 1.

    Raises:
        ConfigError: if there are penalties, and a reward has that name.
    """

    def __init__(
        self,
        workflow: RolloutWorkflow,
        *,
        filters: Sequence[GroupFilter] = (),
        penalties: Sequence[LengthPenalty] = (),
    ) -> None:
        self.workflow = workflow
        self.filters, self.penalties = tuple(filters), tuple(penalties)
        self._weigh_penalty(workflow.reward_weights)

    @property
    def sampling(self) -> SamplingParams:
        return self.workflow.sampling

    @property
    def reward_weights(self) -> Mapping[str, float]:
        return self._weigh_penalty(self.workflow.reward_weights)

    @property
    def counts(self) -> Mapping[str, int]:
        return self.workflow.counts

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        self.workflow.check_rows(rows)

    def check_prompts(self, rows: Iterable[tuple[int, Row]], tokenizer: Tokenizer) -> None:
        self.workflow.check_prompts(rows, tokenizer)

    def unstopped(self, row: Row, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
        return self.workflow.unstopped(row, tokenizer, eos_token_ids)

    def prompt_lengths(
        self, rows: Sequence[Row], meter: PromptMeter
    ) -> Sequence[PromptLength | None]:
        return self.workflow.prompt_lengths(rows, meter)

    def longest_prompt(self, max_length: int | None) -> int | None:
        return self.workflow.longest_prompt(max_length)

    def close(self) -> None:
        self.workflow.close()

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        trajectories = await self.workflow.run(row, session)
        if session.is_evaluation or not trajectories or session.rejection:
            return trajectories
        for group_filter in self.filters:
            if reason := group_filter.why_not(trajectories):
                session.reject(reason)
                return None
        return [self._penalized(each) for each in trajectories]

    def _penalized(self, trajectory: Trajectory) -> Trajectory:
        penalty = math.fsum(penalty.of(trajectory) for penalty in self.penalties)
        if not trajectory.rewards:
            return replace(trajectory, reward=trajectory.reward + penalty)
        weights = self._weigh_penalty(trajectory.reward_weights)
        own = {PENALTY: penalty} if self.penalties else {}
        return trajectory.with_rewards({**trajectory.rewards, **own}, weights)

    def _weigh_penalty(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """The weights of several rewards, that of the penalties included."""
        if not self.penalties or not weights:
            return weights
        if PENALTY in weights:
            raise ConfigError(
                f"a reward is named {PENALTY!r}, as the penalties of a ShapedWorkflow are: rename "
                "it."
            )
        return {**weights, PENALTY: 1.0}
