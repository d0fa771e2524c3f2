"""The tokens of a conversation: what the policy said is what it sampled, token for token."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.agent.request import (
    AgentRequest,
    Answer,
    Tool,
    chain_of_keys,
    key_of,
)
from sdp_lightning.workflows.agent.tree import Turn
from sdp_lightning.workflows.chat.messages import Message
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn, outline
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Said:
    """An answer that was given: its turn, its message, and how it was stopped."""

    turn: Turn
    message: Message
    params: SamplingParams


class ConversationRenderer:
    """Renders the requests of one sample, whose answers it remembers.

    A conversation that begins as an earlier one, through its answer, has the tokens of that turn,
    and only what follows is encoded. In any other, each of the assistant's messages that equals an
    earlier answer has that answer's tokens.

    Args:
        tokenizer: tokenizer of the policy.
        settings: how prompts and turns are written.
    """

    def __init__(self, tokenizer: Tokenizer, settings: ChatSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._by_conversation: dict[str, _Said] = {}
        self._by_answer: dict[str, _Said] = {}

    def remember(self, request: AgentRequest, answer: Answer, params: SamplingParams) -> None:
        """Keep the answer to a request for the conversations that go on with it."""
        if request.messages is None:
            return
        said = _Said(answer.turn, answer.message, params)
        keys = chain_of_keys([*request.messages, answer.message], request.tools)
        self._by_conversation[keys[-1]] = self._by_answer[key_of(answer.message)] = said

    def render(self, request: AgentRequest) -> list[int]:
        """All tokens that the policy reads before it answers.

        Raises:
            RolloutError: if the chat template shows not all of the conversation.
            ConfigError: if a setting has no effect on the tokenizer.
        """
        if request.prompt is not None:
            return self._prompt(request.prompt)
        messages, tools = list(request.messages or ()), request.tools
        keys = chain_of_keys(messages, tools)
        last = max(
            (i for i, key in enumerate(keys[:-1]) if key in self._by_conversation), default=None
        )
        try:
            if last is not None:
                said = self._by_conversation[keys[last]]
                return self._splice(messages, tools, said.turn.token_ids.tolist(), last, said)
            return self._from_the_start(messages, tools)
        except (RolloutError, ConfigError) as error:
            tokens = self._opening(messages, tools)
            _say_rewritten(str(error))
            return tokens

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return encode_opening(
            *(prompt, self._tokenizer), use_chat_template=False, settings=self._settings
        )

    def _opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        return encode_opening(
            *(list(messages), self._tokenizer),
            use_chat_template=True,
            tools=tools,
            settings=self._settings,
        )

    def _from_the_start(self, messages: list[Message], tools: Sequence[Tool]) -> list[int]:
        first = self._next_known(messages, 1)
        tokens = self._opening(messages[:first], tools)
        if first is None:
            return tokens
        said = self._by_answer[key_of(messages[first])]
        return self._splice(messages, tools, [*tokens, *said.turn.sampled], first, said)

    def _splice(
        self,
        messages: list[Message],
        tools: Sequence[Tool],
        tokens: list[int],
        at: int,
        said: _Said,
    ) -> list[int]:
        """``tokens``, which end with the answer at the place ``at``, and all that follows it."""
        while True:
            following = self._next_known(messages, at + 2)
            tokens += self._between(messages[:at], messages[at + 1 : following], tools, said)
            if following is None:
                return tokens
            at, said = following, self._by_answer[key_of(messages[following])]
            tokens += said.turn.sampled

    def _between(
        self,
        history: Sequence[Message],
        messages: Sequence[Message],
        tools: Sequence[Tool],
        said: _Said,
    ) -> list[int]:
        """The tokens between an answer and the next, or the end of the conversation."""
        sampled, params = said.turn.sampled, said.params
        calls = [said.message] if "tool_calls" in said.message else []
        return encode_turn(
            [*calls, *messages],
            self._tokenizer,
            turn_format=None,
            stopped_by=sampled[-1] if sampled[-1] in params.stop_token_ids else None,
            sampled=sampled,
            history=outline(list(history)),
            tools=tools,
            settings=replace(self._settings, stop=params.stop_texts),
        )

    def _next_known(self, messages: Sequence[Message], start: int) -> int | None:
        """The place of the next message that equals an answer; the last message is open."""
        return next(
            (
                place
                for place in range(start, len(messages) - 1)
                if messages[place]["role"] == "assistant"
                and messages[place - 1]["role"] != "assistant"
                and key_of(messages[place]) in self._by_answer
            ),
            None,
        )


@functools.cache
def _say_rewritten(why: str) -> None:
    logger.warning(
        "an agent's conversation is written anew by the chat template, as what stands between two "
        "turns cannot be told: %s It begins a branch, in which earlier answers are context.",
        why,
    )
