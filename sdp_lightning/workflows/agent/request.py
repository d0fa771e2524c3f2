"""What an agent asks and is answered, whatever the API that it speaks; and why it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdp_lightning.workflows.agent.tree import Turn
from sdp_lightning.workflows.chat.messages import Message, as_messages

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")


class RefusedRequest(Exception):
    """A request that gets an error of its API instead of an answer.

    Args:
        status: HTTP status.
        code: what OpenAI's API calls such an error.
        message: what was found, and what to do.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class AgentRequest:
    """One request for an answer.

    Attributes:
        messages: the conversation; None if the request has ``prompt``.
        prompt: text or token ids that the policy continues.
        tools: functions that the policy may call.
        reads_calls: whether calls of tools are looked for in the answer.
        max_tokens: most tokens of the answer; None is the run's.
        stop: texts that end the answer, and are left out of its text.
        is_streamed: whether the answer is sent as server-sent events.
        settings: what the client asks of sampling and may not decide, by name.
        echo: fields of the body that the answer's form depends on.
    """

    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Tool] = ()
    reads_calls: bool = True
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    is_streamed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    echo: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Call:
    """A call of a tool in an answer.

    Attributes:
        id: by which the client's result names it.
        name: name of the tool.
        arguments: its arguments by name.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        id: unique among all answers.
        text: what the policy wrote, without calls and special tokens.
        calls: calls of tools, in order.
        turn: its tokens.
        is_cut: whether it ended at its budget, and not by itself.
        created: seconds since 1970.
    """

    id: str
    text: str
    calls: tuple[Call, ...]
    turn: Turn
    created: int

    @property
    def is_cut(self) -> bool:
        """Whether it ended at its budget, and not by itself."""
        return self.turn.finish_reason != "stop"

    @property
    def message(self) -> Message:
        """The answer as a message of a conversation."""
        said: Message = {"role": "assistant", "content": self.text}
        if self.calls:
            said["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in self.calls
            ]
        return said


def read_messages(given: Any) -> list[Message]:
    """Messages of a request in the one form that rendering starts from.

    A result of a tool gets the name of the call that it answers.

    Raises:
        RolloutError: if they are no messages of text.
    """
    names: dict[str, str] = {}
    messages: list[Message] = []
    for message in as_messages(given, "request"):
        kept = {key: message[key] for key in _KEPT if key in message}
        for call in kept.get("tool_calls", ()):
            names[str(call.get("id"))] = call["function"]["name"]
        name = names.get(str(kept.get("tool_call_id")))
        if kept["role"] == "tool" and name is not None:
            kept.setdefault("name", name)
        messages.append(kept)
    return messages


def chain_of_keys(messages: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
    """A key of each beginning of a conversation, through each of its messages.

    Equal keys are equal conversations. What the assistant said is equal whatever white space is
    around it, and whatever the ids of its calls are.
    """
    key, keys = _digest("", list(tools)), list[str]()
    for message in messages:
        key = _digest(key, said_by(message))
        keys.append(key)
    return keys


def said_by(message: Message) -> list[Any]:
    """What matters of a message for its equality with another."""
    content: str = message["content"]
    calls = [
        [call["function"]["name"], call["function"]["arguments"]]
        for call in message.get("tool_calls", ())
    ]
    is_own = message["role"] == "assistant"
    return [message["role"], content.strip() if is_own else content, calls]


def key_of(message: Message) -> str:
    """A key of one message alone."""
    return _digest("", said_by(message))


def _digest(before: str, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(f"{before}{text}".encode(), digest_size=20).hexdigest()
