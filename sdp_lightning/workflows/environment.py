"""What a rollout of several turns talks to: the world's side of a conversation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.pool import RewardRejected
from sdp_lightning.rewards.timeouts import call_bounded
from sdp_lightning.rewards.value import as_reward
from sdp_lightning.types import Row

Message = Mapping[str, str]
Observation = str | Sequence[Message]


class StepResult(NamedTuple):
    """What the world answers to one turn; a plain tuple of the three will do.

    Attributes:
        observation: what the policy reads next; left out of the trajectory when it is done.
        reward: of this turn; a trajectory's is the sum.
        done: whether the conversation is over.
    """

    observation: Observation = ""
    reward: float = 0.0
    done: bool = False


class Environment(ABC):
    """The world of one rollout. Every sample of a group has its own.

    An observation is text, or a list of ``{"role", "content"}`` messages. Methods are plain or
    async. The calls of plain ones come one after another, each in a thread of its own, so they may
    block. After a resume the turns that were saved are played again: given the same row and the
    same completions, it should answer the same. Where it does not, that group's saved tokens are
    discarded, and it is sampled from scratch.
    """

    @abstractmethod
    def reset(self, row: Row) -> Observation | Awaitable[Observation]:
        """Begin; returns what the policy reads first: the prompt."""

    @abstractmethod
    def step(
        self, completion: str
    ) -> tuple[Observation, float, bool] | Awaitable[tuple[Observation, float, bool]]:
        """Answer one turn with a :class:`StepResult`.

        Args:
            completion: what was sampled, stop texts included, special tokens left out. It may have
                been cut off at the turn's budget.
        """

    def close(self) -> Awaitable[None] | None:  # noqa: B027 # most hold nothing
        """The rollout has ended, also by an error; a ``step`` that hangs may still run."""


class BoundedEnvironment:
    """An environment whose every call has a deadline, and whose errors say which call it was."""

    def __init__(self, environment: Environment, *, timeout_s: float) -> None:
        self._environment, self._timeout_s = environment, timeout_s
        self._name = type(environment).__name__
        self._num_steps = 0

    async def reset(self, row: Row) -> Any:
        """The first observation."""
        return await self._call(self._environment.reset, row, call="reset()")

    async def step(self, completion: str) -> StepResult:
        """Play one turn.

        Raises:
            RolloutError: if it raises, is late, or returns something else than a result.
        """
        self._num_steps += 1
        call = f"step() number {self._num_steps}"
        found = await self._call(self._environment.step, completion, call=call)
        if not isinstance(found, tuple) or len(found) != 3:
            raise RolloutError(
                f"{self._name}.{call} returned {found!r}; it must be a tuple: observation, reward, "
                "done."
            )
        observation, reward, done = found
        if not isinstance(done, bool | np.bool_):
            raise RolloutError(f"{self._name}.{call} returned done={done!r}; it must be a bool.")
        return StepResult(observation, as_reward(reward, f"{self._name}.step"), bool(done))

    async def close(self) -> None:
        """Let go of what the environment holds."""
        if type(self._environment).close is not Environment.close:
            await self._call(self._environment.close, call="close()")

    async def _call(self, function: Callable[..., Any], *args: Any, call: str) -> Any:
        what = f"{self._name}.{call}"
        try:
            return await call_bounded(function, *args, timeout_s=self._timeout_s, what=what)
        except RewardRejected:
            raise
        except Exception as error:
            if isinstance(error, RolloutError) and str(error).startswith(what):
                raise
            raise RolloutError(f"{what} failed: {error!r}") from error
