"""Environments: the other side of a conversation of several turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdp_lightning.errors import InfrastructureError, RolloutError
from sdp_lightning.rewards.pool import RewardRejected
from sdp_lightning.rewards.timeouts import call_with_timeout
from sdp_lightning.rewards.value import Score, as_score
from sdp_lightning.types import Row
from sdp_lightning.workflows.completion import completion_text
from sdp_lightning.workflows.workflow import Tokenizer

Message = Mapping[str, Any]
Observation = str | Message | Sequence[Message]

_LONGEST_SHOWN = 200  # characters of a wrong value in an error


class StepResult(NamedTuple):
    """The answer of an environment to one turn; a plain tuple of the three will do.

    Attributes:
        observation: text or messages that the policy reads next; ignored when done.
        reward: reward of this turn, or several by name; those of a trajectory are the sums.
        done: whether the conversation is over.
    """

    observation: Observation = ""
    reward: Score = 0.0
    done: bool = False


class Transcript:
    """What a workflow knows of a conversation beside the text that ``step`` reads: its tokens.

    Args:
        tokenizer: tokenizer of the policy.
        stop_token_ids: tokens that end a turn.
        stop_texts: texts that end a turn.
        is_chat: whether a chat template writes the prompt, also one that is text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
        *,
        is_chat: bool = True,
    ) -> None:
        self.tokenizer, self.is_chat = tokenizer, is_chat
        self._stop_token_ids, self._stop_texts = stop_token_ids, stop_texts
        self.hear("", (), ())

    def hear(self, text: str, token_ids: Sequence[int], history: Sequence[int]) -> None:
        """Take in a turn: its text, its tokens, and those before it."""
        self._text, self._token_ids, self._history = text, token_ids, history

    def with_special_tokens(self, completion: str) -> str:
        """The last turn with its special tokens; ``completion`` if that is another text."""
        if completion != self._text:
            return completion
        return completion_text(
            *(self._token_ids, self.tokenizer),
            stop_token_ids=self._stop_token_ids,
            stop_texts=self._stop_texts,
            keep_special_tokens=True,
        )

    def before(self, num_tokens: int = 0) -> str:
        """The text before the last turn, or of so many tokens of it, special tokens included."""
        return self.tokenizer.decode(list(self._history[-num_tokens:]), skip_special_tokens=False)


class Environment(ABC):
    """The environment of one rollout. Every sample of a group has its own.

    An observation is text, one ``{"role", "content"}`` message, or a list of such. Methods are
    plain or async. Plain ones are called one after another, each in some thread, so they may block.
    They may return what gymnasium's do, and scalars of numpy or torch.
    After a resume the saved turns are played again: given the same row and the same completions, it
    should answer the same. If it does not, the saved tokens of that group are discarded, and it is
    sampled from scratch.

    Attributes:
        activity: what a call is at, for the error if it is late; an environment may set it.
    """

    activity: str = ""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of functions that the policy may call: its chat template is given them."""
        return ()

    def begin(self, transcript: Transcript) -> None:  # noqa: B027 # most read the text alone
        """Called before ``reset``, with what keeps the tokens of this rollout. It must not block.

        Raises:
            ConfigError: if the environment does not suit the tokenizer.
        """

    @abstractmethod
    def reset(self, row: Row) -> Observation | Awaitable[Observation]:
        """Begin with ``row``; returns the first observation, the prompt, or it and an info."""

    @abstractmethod
    def step(self, completion: str) -> tuple[Any, ...] | Awaitable[tuple[Any, ...]]:
        """Answer one turn with a :class:`StepResult`.

        Gymnasium's observation, reward, terminated, truncated, info will do as well: a conversation
        that is truncated ends like one that has run out of turns, and the info is not read.

        Args:
            completion: the sampled text, with stop texts and without special tokens, unless the
                workflow keeps them. It may have been cut off at the turn's budget.
        """

    def close(self) -> Awaitable[None] | None:  # noqa: B027 # most hold nothing
        """Release resources when the rollout has ended; a ``step`` that hangs may still run."""


class BoundedEnvironment:
    """An environment with a deadline for every call, whose errors name the call.

    Attributes:
        is_truncated: whether the last step said that the conversation was cut off.
    """

    def __init__(
        self, environment: Environment, *, timeout_s: float, transcript: Transcript | None = None
    ) -> None:
        self._environment, self._timeout_s = environment, timeout_s
        self._transcript = transcript
        self._name = type(environment).__name__
        self._num_steps = 0
        self.is_truncated = False

    async def reset(self, row: Row) -> Observation:
        """The first observation: text or a list of messages.

        Raises:
            RolloutError: if the call raises, is late, or returns neither.
        """
        if self._transcript is not None:
            self._environment.begin(self._transcript)
        opening = _plain(await self._call(self._environment.reset, row, call="reset()"))
        if isinstance(opening, tuple) and len(opening) == 2 and _is_info(opening[1]):
            opening = _plain(opening[0])
        return _checked(opening, f"{self._name}.reset(): the prompt")

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools that the chat template is to show with the prompt."""
        return self._environment.tools

    async def step(
        self, completion: str, token_ids: Sequence[int] = (), history: Sequence[int] = ()
    ) -> StepResult:
        """Play one turn.

        Args:
            completion: the text of the turn.
            token_ids: its tokens, for the transcript.
            history: ``[m]`` the tokens before it, for the transcript.

        Raises:
            RolloutError: if the call raises, is late, or returns no result.
        """
        self._num_steps += 1
        if self._transcript is not None:
            self._transcript.hear(completion, token_ids, history)
        call = f"step() number {self._num_steps}"
        result = await self._call(self._environment.step, completion, call=call)
        if not isinstance(result, tuple) or len(result) not in (3, 5):
            raise RolloutError(
                f"{self._name}.{call} returned {shown(result)}; it must be a tuple: observation, "
                "reward, done; or observation, reward, terminated, truncated, info."
            )
        observation, reward, *ends = (_plain(value) for value in result[:4])
        for end in ends:
            if not isinstance(end, bool):
                name = "done" if len(ends) == 1 else "terminated or truncated"
                raise RolloutError(
                    f"{self._name}.{call} returned {name}={shown(end)}; it must be a bool."
                )
        self.is_truncated = ends == [False, True]
        try:
            reward = as_score(reward, f"{self._name}.step")
        except RolloutError as error:
            raise RolloutError(f"{self._name}.{call}: {error}") from error
        if not any(ends):
            observation = _checked(observation, f"{self._name}.{call}: the observation")
        return StepResult(observation, reward, any(ends))

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
                if isinstance(error.__cause__, TimeoutError) and self._environment.activity:
                    at = self._environment.activity
                    raise RolloutError(f"{error} It was at {at}.") from error
                raise
            raise RolloutError(f"{what} failed: {error!r}") from error


def shown(value: object) -> str:
    """The beginning of ``repr(value)``; its type, if it is too deep or too large to be shown."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _plain(value: Any) -> Any:
    """Python's own value of a scalar or an array of numpy, torch or another library."""
    # foreign: any library's array
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _is_info(value: object) -> bool:
    return isinstance(value, Mapping) and "role" not in value


def _checked(observation: Any, what: str) -> Observation:
    """An observation: text, or a list of messages. ``RolloutError`` if it is neither."""
    if isinstance(observation, str):
        return observation
    messages: Any = [observation] if isinstance(observation, Mapping) else observation
    if isinstance(messages, list | tuple) and all(isinstance(m, Mapping) for m in messages):
        return list(messages)
    raise RolloutError(
        f"{what} {shown(observation)} is neither text nor a list of {{'role', 'content'}} messages."
    )
