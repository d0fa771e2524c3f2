"""Environments: the other side of a conversation of several turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdp_lightning.errors import InfrastructureError, RolloutError
from sdp_lightning.rewards.pool import RewardRejected
from sdp_lightning.rewards.timeouts import call_with_timeout
from sdp_lightning.rewards.value import as_reward
from sdp_lightning.types import Row

Message = Mapping[str, str]
Observation = str | Sequence[Message]


class StepResult(NamedTuple):
    """The answer of an environment to one turn; a plain tuple of the three will do.

    Attributes:
        observation: text or messages that the policy reads next; ignored when done.
        reward: reward of this turn; that of a trajectory is the sum.
        done: whether the conversation is over.
    """

    observation: Observation = ""
    reward: float = 0.0
    done: bool = False


class Environment(ABC):
    """The environment of one rollout. Every sample of a group has its own.

    An observation is text, or a list of ``{"role", "content"}`` messages. Methods are plain or
    async. Plain ones are called one after another, each in some thread, so they may block.
    After a resume the saved turns are played again: given the same row and the same completions, it
    should answer the same. If it does not, the saved tokens of that group are discarded, and it is
    sampled from scratch.
    """

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of functions that the policy may call: its chat template is given them."""
        return ()

    @abstractmethod
    def reset(self, row: Row) -> Observation | Awaitable[Observation]:
        """Begin with ``row``; returns the first observation: the prompt."""

    @abstractmethod
    def step(
        self, completion: str
    ) -> tuple[Observation, float, bool] | Awaitable[tuple[Observation, float, bool]]:
        """Answer one turn with a :class:`StepResult`.

        Args:
            completion: the sampled text, with stop texts and without special tokens, unless the
                workflow keeps them. It may have been cut off at the turn's budget.
        """

    def close(self) -> Awaitable[None] | None:  # noqa: B027 # most hold nothing
        """Release resources when the rollout has ended; a ``step`` that hangs may still run."""


class BoundedEnvironment:
    """An environment with a deadline for every call, whose errors name the call."""

    def __init__(self, environment: Environment, *, timeout_s: float) -> None:
        self._environment, self._timeout_s = environment, timeout_s
        self._name = type(environment).__name__
        self._num_steps = 0

    async def reset(self, row: Row) -> Any:
        """The first observation."""
        return await self._call(self._environment.reset, row, call="reset()")

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools that the chat template is to show with the prompt."""
        return self._environment.tools

    async def step(self, completion: str) -> StepResult:
        """Play one turn.

        Raises:
            RolloutError: if the call raises, is late, or returns no result.
        """
        self._num_steps += 1
        call = f"step() number {self._num_steps}"
        result = await self._call(self._environment.step, completion, call=call)
        if not isinstance(result, tuple) or len(result) != 3:
            raise RolloutError(
                f"{self._name}.{call} returned {result!r}; it must be a tuple: observation, "
                "reward, done."
            )
        observation, reward, done = result
        if not isinstance(done, bool | np.bool_):
            raise RolloutError(f"{self._name}.{call} returned done={done!r}; it must be a bool.")
        return StepResult(observation, as_reward(reward, f"{self._name}.step"), bool(done))

    async def close(self) -> None:
        """Close the environment, if it has something to close."""
        if type(self._environment).close is not Environment.close:
            await self._call(self._environment.close, call="close()")

    async def _call(self, function: Callable[..., Any], *args: Any, call: str) -> Any:
        what = f"{self._name}.{call}"
        try:
            return await call_with_timeout(function, *args, timeout_s=self._timeout_s, what=what)
        except (RewardRejected, InfrastructureError):
            raise
        except Exception as error:
            if isinstance(error, RolloutError) and str(error).startswith(what):
                raise
            raise RolloutError(f"{what} failed: {error!r}") from error
