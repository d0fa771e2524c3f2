"""One sample's conversation with its agent: what a key opens, and what it may still ask."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from sdp_lightning.config.pretrained import count_tokens
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards.timeouts import call_aside_if_long
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.agent.answers import read_answer
from sdp_lightning.workflows.agent.rendering import ConversationRenderer
from sdp_lightning.workflows.agent.request import AgentRequest, Answer, RefusedRequest
from sdp_lightning.workflows.agent.tree import TurnTree
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.send_gate import is_being_cancelled
from sdp_lightning.workflows.stops import with_stops
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

ClientSampling = Literal["override", "refuse"]
SideRequest = Callable[[Mapping[str, Any]], bool]
_MOST_TOKENS = 2**31  # of a tokenizer that does not say how many it has
MOST_AT_ONCE = 64  # requests of one sample that are answered at the same time


@dataclass(frozen=True)
class SessionSettings:
    """How the requests of a sample are answered.

    Args:
        params: sampling settings of one answer, with the stops of the run.
        chat: how conversations are written.
        max_turns: most answers of a sample.
        max_total_tokens: length of a conversation, its answer included; None is no bound.
        tool_call_format: how the policy writes calls.
        client_sampling: whether what a client may not decide is overridden or refused.
        is_side: tells from the body of a request whether it is left out of training.
        model: name of the model.
    """

    params: SamplingParams
    chat: ChatSettings
    max_turns: int
    max_total_tokens: int | None
    tool_call_format: str | Mapping[str, Any] = "auto"
    client_sampling: ClientSampling = "override"
    is_side: SideRequest | None = None
    model: str = "policy"


@dataclass(eq=False)
class _Asked:
    """A request under way or answered; ``is_taken``: its answer was sent, or a retry waits."""

    answer: asyncio.Task[Answer]
    is_taken: bool = False


@dataclass(eq=False)
class SessionCounts:
    """Counts of what became of requests.

    Args:
        retried: requests that a client sent again, and that got the answer of the first.
        refused: requests that got an error.
        overridden: requests whose sampling settings were those of the run instead.
    """

    retried: int = 0
    refused: int = 0
    overridden: int = 0


@dataclass(eq=False)
class AgentSession:
    """Answers the requests of one sample. Used in the event loop's thread only.

    An answer is sampled to its end once it is asked for, whether its client waits or not: one that
    gave up waiting and asks again gets the same answer.

    Attributes:
        counts: what became of requests.
        over_budget: the budget that a request was refused for; empty if none was.
        failed: done with the error that ended the sample from within, such as the engine's.
    """

    tree: TurnTree
    tokenizer: Tokenizer
    settings: SessionSettings
    counts: SessionCounts = field(default_factory=SessionCounts)
    over_budget: Literal["", "max_turns", "max_total_tokens"] = ""

    def __post_init__(self) -> None:
        self._renderer = ConversationRenderer(self.tokenizer, self.settings.chat)
        self._asked: dict[str, list[_Asked]] = {}
        self._answers: list[tuple[AgentRequest, Answer]] = []
        self._is_ended = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def answers(self) -> list[tuple[AgentRequest, Answer]]:
        """What was asked and answered, in the order of the answers."""
        return list(self._answers)

    async def answer(
        self, request: AgentRequest, body: Mapping[str, Any], digest: str, *, is_retry: bool
    ) -> Answer:
        """The answer to a request.

        Args:
            request: what is asked.
            body: as the client sent it.
            digest: of the body; a retry gets the answer of an earlier request with the same one.
            is_retry: whether the client says that it sends the request again.

        Raises:
            RefusedRequest: if it is not answered.
        """
        earlier = self._asked.get(digest, []) if is_retry else []
        if earlier:
            self.counts.retried += 1
            asked = next((each for each in earlier if not each.is_taken), earlier[-1])
        else:
            asked = _Asked(self._begin(self._answer(request, body)))
            self._asked.setdefault(digest, []).append(asked)
            asked.answer.add_done_callback(functools.partial(self._on_done, digest, asked))
        asked.is_taken = is_retry
        try:
            answer = await asyncio.shield(asked.answer)
        except asyncio.CancelledError:
            if not is_being_cancelled():  # the sample has ended, not the client's wait
                self.refuse_if_ended()
            raise
        asked.is_taken = True
        return answer

    async def end(self) -> None:
        """End what is under way; later requests are refused."""
        self._is_ended = True
        tasks = [asked.answer for each in self._asked.values() for asked in each]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.tree.forget()
        if not self.failed.cancel() and not self.failed.cancelled():
            self.failed.exception()  # it was seen

    def fail(self, error: BaseException) -> None:
        """End the sample with an error, unless it has one."""
        if not self.failed.done():
            self.failed.set_exception(error)

    def refuse_if_ended(self) -> None:
        """Raise ``RefusedRequest`` once the sample has ended."""
        if self._is_ended:
            raise RefusedRequest(
                403, "session_ended", "this key's sample has ended: its agent returned, or was cut."
            )

    def _begin(self, answering: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        try:
            self.refuse_if_ended()
            running = sum(not a.answer.done() for each in self._asked.values() for a in each)
            num_turns = running + len(self._answers)
            if running >= MOST_AT_ONCE:
                raise RefusedRequest(
                    403, "too_many_requests", f"{running} requests of this key wait already."
                )
            if num_turns >= self.settings.max_turns:
                self._refuse_over("max_turns", f"max_turns={self.settings.max_turns} answers")
        except RefusedRequest:
            answering.close()
            raise
        return asyncio.get_running_loop().create_task(answering)

    def _on_done(self, digest: str, asked: _Asked, task: asyncio.Task[Answer]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RefusedRequest):
            self._asked[digest].remove(asked)  # it is no turn, and may be asked again
        elif error is not None:
            self.fail(error)

    async def _answer(self, request: AgentRequest, body: Mapping[str, Any]) -> Answer:
        is_side = self.settings.is_side is not None and bool(self.settings.is_side(body))
        base = self._params(request)
        try:
            tokens = await call_aside_if_long(
                "writing a conversation",
                [request.messages, request.prompt, request.tools],
                self._renderer.render,
                request,
            )
        except (RolloutError, ConfigError) as error:
            raise RefusedRequest(400, "invalid_request", str(error)) from error
        if isinstance(request.prompt, list) and max(tokens) >= (
            most := _num_tokens(self.tokenizer)
        ):
            raise RefusedRequest(400, "invalid_request", f"token ids must be below {most}.")
        params = self._within_bounds(base, len(tokens))
        turn = await self.tree.take_turn(np.array(tokens, dtype=np.int64), params, is_side=is_side)
        answer = await call_aside_if_long(
            "reading an answer",
            turn.sampled,
            read_answer,
            *(turn, request, params, self.tokenizer, self.settings.tool_call_format),
        )
        self._renderer.remember(request, answer, params)
        self._answers.append((request, answer))
        return answer

    def _params(self, request: AgentRequest) -> SamplingParams:
        """The run's settings, with what the client may decide; ``RefusedRequest`` otherwise."""
        own = self.settings.params
        asked = {
            name: value
            for name, value in request.settings.items()
            if value is not None and value != _RUNS.get(name, lambda params: None)(own)
        }
        if asked and self.settings.client_sampling == "refuse":
            raise RefusedRequest(
                400,
                "unsupported_parameter",
                f"{_listed(asked)} cannot be decided by a client: the run samples at "
                f"temperature={own.temperature}, top_p={own.top_p}. Leave it out.",
            )
        self.counts.overridden += bool(asked)
        for name in asked:
            _say_overridden(name)
        most = own.max_new_tokens if request.max_tokens is None else request.max_tokens
        try:
            params = replace(own, max_new_tokens=min(most, own.max_new_tokens))
            return with_stops(params, self.tokenizer, request.stop) if request.stop else params
        except ConfigError as error:
            raise RefusedRequest(400, "invalid_request", str(error)) from error

    def _within_bounds(self, params: SamplingParams, num_read: int) -> SamplingParams:
        limit = self.settings.max_total_tokens
        if limit is None:
            return params
        if num_read >= limit:
            self.over_budget = "max_total_tokens"
            raise RefusedRequest(
                400,
                "context_length_exceeded",
                f"the conversation has {num_read} tokens, which leaves none of the {limit} of a "
                "conversation (max_total_tokens) to answer: shorten it.",
            )
        return replace(params, max_new_tokens=min(params.max_new_tokens, limit - num_read))

    def _refuse_over(self, budget: Literal["max_turns"], what: str) -> None:
        self.over_budget = budget
        raise RefusedRequest(
            403, "budget_exceeded", f"the sample has used up its budget of {what}."
        )


# What a client may say of sampling without effect, because it is what the run does.
_RUNS: Mapping[str, Callable[[SamplingParams], Any]] = {
    "temperature": lambda params: params.temperature,
    "top_p": lambda params: params.top_p,
    "top_k": lambda params: params.top_k,
    "tool_choice": lambda params: "auto",
    "presence_penalty": lambda params: 0,
    "frequency_penalty": lambda params: 0,
    "min_p": lambda params: 0,
    "repetition_penalty": lambda params: 1,
}


@functools.lru_cache(maxsize=8)
def _num_tokens(tokenizer: Tokenizer) -> int:
    found = count_tokens(tokenizer)
    return _MOST_TOKENS if found is None else found


def _listed(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.80}" for name, value in asked.items())


@functools.cache
def _say_overridden(name: str) -> None:
    logger.warning(
        "agents ask for %s of their own: it has no effect, as what is trained must be sampled as "
        "the run says. Their requests are counted; client_sampling='refuse' refuses them.",
        name,
    )
