"""The rewards of a workflow: who calls each of them, and how several become one number.

A *score* is what one reward function returns: a number, or numbers by name. The scores of a sample
make its reward, or its named rewards with their weights.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards.asked import asked_by
from sdp_lightning.rewards.foreign_code import refuse_without_workers
from sdp_lightning.rewards.pool import RewardPool
from sdp_lightning.rewards.row_checks import refuse_unreadable_rows
from sdp_lightning.rewards.timeouts import call_reward
from sdp_lightning.rewards.value import LostZero, Score, why_no_name
from sdp_lightning.types import Row
from sdp_lightning.workflows.completion import Completion
from sdp_lightning.workflows.own_row import own_copy
from sdp_lightning.workflows.workflow import gather_or_cancel

Value = float | Sequence[float] | Mapping[str, float] | Sequence[Mapping[str, float]]
Reward = Callable[..., Value | Mapping[str, Sequence[float]] | Awaitable[Any]]
# jsonargparse writes a config by the first type that takes a value: Callable takes a mapping.
Rewards = str | Mapping[str, str | Reward] | Reward

LONE = ""  # key of a reward that has no name of its own
Scores = Mapping[str, Score]  # of one sample, by the keys of its rewards


class RewardCaller:
    """One reward, called in this process or by a pool.

    Args:
        reward: a function, a pool, or an import path.
        workers: number of processes of a new pool; 0 calls a function here.
        timeout_s: seconds that a call may take.

    Raises:
        ConfigError: if it is no function, cannot run where it is told to, or needs what no reward
            is given.
    """

    def __init__(self, reward: str | Reward, *, workers: int, timeout_s: float) -> None:
        self.function: Any = load_object(reward) if isinstance(reward, str) else reward
        if not callable(self.function):
            raise ConfigError(f"reward must be a function, got {self.function!r}.")
        self.pool: RewardPool | None = None
        if isinstance(self.function, RewardPool):
            self.pool = self.function
        elif workers:
            self.pool = RewardPool(reward, num_workers=workers, timeout_s=timeout_s)
        else:
            refuse_without_workers(self.function)
        self.asked = asked_by(self.function if self.pool is None else self.pool.reward)
        self._timeout_s = timeout_s

    async def score_sample(self, sample: Completion, row: Row) -> Score:
        """The score of one sample."""
        asked = {name: sample.ask(name) for name in self.asked.names}
        if self.pool is not None:
            return await self.pool(sample.text, row, **asked)
        return await self._call_here(sample.text, row, asked)

    async def score_group(self, samples: Sequence[Completion], row: Row) -> list[Score]:
        """The scores of a group, by a reward that is given all of it."""
        texts = [each.text for each in samples]
        asked: dict[str, Any] = {
            name: samples[0].prompt if name == "prompt" else [each.ask(name) for each in samples]
            for name in self.asked.names
        }
        if self.pool is not None:
            return await self.pool.score_group(texts, row, **asked)
        return await self._call_here(texts, row, asked)

    async def _call_here(self, completion: str | list[str], row: Row, asked: dict[str, Any]) -> Any:
        """The score of the function, which may change its own copy of the row."""
        if "messages" in asked:
            asked["messages"] = await own_copy(asked["messages"])
        limit, row = self._timeout_s, await own_copy(row)
        return await call_reward(self.function, completion, row, timeout_s=limit, **asked)


class Scoring:
    """The rewards of a workflow and their weights.

    The names of a mapping that a lone reward returns are those of the weights; without weights,
    those of its first mapping. They never change.

    Args:
        reward: the one reward; a mapping that it returns makes several.
        rewards: several by name, or one that returns a mapping.
        weights: weight of each name in the sum; None is 1 for each.
        workers: number of processes for each reward that is no pool.
        timeout_s: seconds that a call may take.

    Raises:
        ConfigError: naming the argument, the reward or the weight.
    """

    def __init__(
        self,
        reward: str | Reward | None,
        rewards: Rewards | None,
        weights: Mapping[str, float] | None,
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        if (reward is None) == (rewards is None):
            raise ConfigError(
                "a workflow needs either reward= (one) or rewards= (several by name, or a function "
                f"that returns a mapping), got {'both' if rewards is not None else 'neither'}."
            )
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ConfigError(f"reward_workers must be an integer of at least 0, got {workers!r}.")
        by_name = isinstance(rewards, Mapping)
        given: Any = rewards if by_name else {LONE: rewards if reward is None else reward}
        _check_names(given if by_name else weights, "rewards" if by_name else "reward_weights")
        settings: dict[str, Any] = {"workers": workers, "timeout_s": timeout_s}
        self.callers = {name: RewardCaller(each, **settings) for name, each in given.items()}
        given_pools = [each for each in given.values() if isinstance(each, RewardPool)]
        if workers and len(given_pools) == len(given):
            raise ConfigError(
                f"reward is a RewardPool of {given_pools[0].num_workers} workers already; leave "
                f"out reward_workers={workers}."
            )
        self.weights = checked_weights(weights, list(given) if by_name else None)
        self._returns_mapping = rewards is not None and not by_name
        self._is_plain: bool | None = False if by_name or self.weights else None  # None: unknown

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards, as far as they are known; empty for a single one."""
        return tuple(self.weights)

    @property
    def asks_for_prompt(self) -> bool:
        """Whether a reward is given the text that the policy read."""
        return any("prompt" in caller.asked.names for caller in self.callers.values())

    @property
    def scores_groups(self) -> bool:
        """Whether a reward is given a whole group at once."""
        return any(caller.asked.is_group for caller in self.callers.values())

    @property
    def pools(self) -> dict[str, RewardPool]:
        """The pools by the names of their rewards."""
        pools = {name: caller.pool for name, caller in self.callers.items()}
        return {name: pool for name, pool in pools.items() if pool is not None}

    def check_rows(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Raise ``ConfigError`` if there are rows that a reward cannot score."""
        rows = rows if len(self.callers) == 1 else list(rows)
        for caller in self.callers.values():
            refuse_unreadable_rows(caller.function, rows)

    async def score_sample(self, sample: Completion, row: Row) -> Scores:
        """The scores of a sample, side by side, by the rewards that are given one sample."""
        return await _together(
            {
                name: caller.score_sample(sample, row)
                for name, caller in self.callers.items()
                if not caller.asked.is_group
            }
        )

    async def score_group(self, samples: Sequence[Completion], row: Row) -> list[Scores]:
        """The scores of each sample, by the rewards that are given the whole group."""
        columns = await _together(
            {
                name: caller.score_group(samples, row)
                for name, caller in self.callers.items()
                if caller.asked.is_group
            }
        )
        return [{name: each[i] for name, each in columns.items()} for i in range(len(samples))]

    def reward_of(self, scores: Scores) -> float | dict[str, float]:
        """The reward of a sample, or its rewards by name, in the order of the names.

        Raises:
            RolloutError: if a reward returned other names than before, or a mapping where it is
                one of several.
            InfrastructureError: if a call was lost whose names are not known yet.
        """
        if LONE in self.callers:
            return self._of_lone(scores[LONE])
        named: dict[str, float] = {}
        for name in self.names:
            score = scores[name]
            if isinstance(score, dict):
                raise RolloutError(
                    f"reward {name!r} is one of several, and returned {score}; it must be a "
                    "number. One that returns a mapping stands alone: rewards=function."
                )
            named[name] = score
        return named

    def _of_lone(self, score: Score) -> float | dict[str, float]:
        if isinstance(score, dict):
            if self._is_plain is None:
                self._is_plain, self.weights = False, dict.fromkeys(score, 1.0)
            if self._is_plain or score.keys() != self.weights.keys():
                before = "one number" if self._is_plain else f"rewards named {sorted(self.weights)}"
                raise RolloutError(
                    f"the reward returned {score}, where it must return {before}: names are the "
                    "same for all samples, and those of reward_weights if there are any."
                )
            return {name: score[name] for name in self.weights}
        if isinstance(score, LostZero):
            if self._returns_mapping and not self.weights:
                raise InfrastructureError("a reward was lost before its names were known")
            return dict.fromkeys(self.weights, 0.0) if self.weights else float(score)
        if self.weights or self._returns_mapping:
            names = f" of {sorted(self.weights)}" if self.weights else ""
            raise RolloutError(
                f"the reward returned {score}, where it must return a mapping{names}."
            )
        self._is_plain = True
        return score


class TurnRewards:
    """The rewards of one conversation, added up over its turns.

    Args:
        weights: weights of several rewards by name; empty for one reward.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.total: float | dict[str, float] = dict.fromkeys(weights, 0.0) if weights else 0.0

    def add(self, score: Score) -> None:
        """Add what a turn is worth: of several rewards some by name, or the number 0.

        Raises:
            RolloutError: if there is no weight for a name, or no name for a number.
        """
        if not isinstance(self.total, dict):
            if isinstance(score, dict):
                raise RolloutError(
                    f"the environment returned the rewards {score}; name all that a conversation "
                    "may have by reward_weights={...} of the workflow."
                )
            self.total += score
        elif isinstance(score, dict):
            for name, reward in score.items():
                if name not in self.total:
                    raise RolloutError(
                        f"the environment returned the rewards {score}, and reward_weights has no "
                        f"{name!r}: it has {sorted(self.total)}."
                    )
                self.total[name] += reward
        elif score:
            raise RolloutError(
                f"the environment returned the reward {score}; with reward_weights it must be a "
                f"mapping of names, of {sorted(self.total)}, or 0."
            )


async def _together(calls: Mapping[str, Coroutine[Any, Any, Any]]) -> dict[str, Any]:
    if len(calls) == 1:
        return {name: await call for name, call in calls.items()}
    return dict(zip(calls, await gather_or_cancel(list(calls.values())), strict=True))


def _check_names(named: Mapping[str, Any] | None, argument: str) -> None:
    if named is not None and (not isinstance(named, Mapping) or not named):
        raise ConfigError(f"{argument} must be a mapping of one name or more, got {named!r}.")
    for name in named or ():
        if why := why_no_name(name):
            raise ConfigError(f"{argument} has the name {name!r}; {why}.")
    if argument == "rewards" and named is not None and set(named) == {"class_path"}:
        raise ConfigError(
            f"rewards: {{class_path: {named['class_path']}}} is a reward with the name class_path. "
            "If it is to be an object of that class, add init_args: {}."
        )


def checked_weights(
    weights: Mapping[str, float] | None, names: Sequence[str] | None = None
) -> dict[str, float]:
    """The weights by name, in the order of ``names``; None takes the names of the weights."""
    if weights is None:
        return dict.fromkeys(names or (), 1.0)
    _check_names(weights, "reward_weights")
    for name, weight in weights.items():
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
        ):
            raise ConfigError(f"reward_weights[{name!r}] must be a finite number, got {weight!r}.")
    if names is None:
        return {name: float(weight) for name, weight in weights.items()}
    if unknown := [name for name in weights if name not in names]:
        raise ConfigError(
            f"reward_weights has {unknown}, but the rewards are {list(names)}. Remove or rename it."
        )
    if missing := [name for name in names if name not in weights]:
        raise ConfigError(f"reward_weights has no weight for {missing}; 0 only records a reward.")
    return {name: float(weights[name]) for name in names}
