"""What an API's form must say, and how fields of a body are read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from sdp_lightning.workflows.agent.request import AgentRequest, Answer, RefusedRequest, Tool
from sdp_lightning.workflows.chat.messages import encodable

_MOST_STOPS = 16


class Event(NamedTuple):
    """A server-sent event.

    Attributes:
        data: sent as JSON; a text as it is.
        name: name of the event; empty: it has none.
    """

    data: Mapping[str, Any] | str
    name: str = ""


class Api(ABC):
    """One API: how its bodies are read, and how answers and errors are written.

    Attributes:
        path: where its requests are posted.
    """

    path: ClassVar[str]

    @abstractmethod
    def read(self, body: Mapping[str, Any]) -> AgentRequest:
        """The request that a body makes.

        Raises:
            RefusedRequest: naming the field that has no meaning here.
            RolloutError: if its messages are not of text.
        """

    @abstractmethod
    def write(self, answer: Answer, request: AgentRequest, model: str) -> dict[str, Any]:
        """The body of an answer."""

    @abstractmethod
    def events(self, answer: Answer, request: AgentRequest, model: str) -> Iterator[Event]:
        """The answer as server-sent events."""

    def error(self, refused: RefusedRequest) -> dict[str, Any]:
        """The body of an error; OpenAI's form."""
        kind = "authentication_error" if refused.status == 401 else "invalid_request_error"
        error = {"message": str(refused), "type": kind, "param": None, "code": refused.code}
        return {"error": error}


def refuse(message: str, code: str = "invalid_request") -> RefusedRequest:
    """A refusal of a body."""
    return RefusedRequest(400, code, message)


def read_count(body: Mapping[str, Any], *names: str) -> int | None:
    """The first of the fields that is there: a number of tokens."""
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise refuse(f"{name} must be an integer of at least 1, got {value!r:.80}.")
        return value
    return None


def read_stop(value: object, name: str = "stop") -> tuple[str, ...]:
    """The texts that end an answer."""
    texts: list[Any] = [value] if isinstance(value, str) else list(read_list(value or [], name))
    are_texts = all(isinstance(text, str) and text and encodable(text) == text for text in texts)
    if len(texts) > _MOST_STOPS or not are_texts:
        raise refuse(f"{name} must be at most {_MOST_STOPS} texts, got {value!r:.80}.")
    return tuple(texts)


def read_flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false if it is not there."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise refuse(f"{name} must be true or false, got {value!r:.80}.")
    return bool(value)


def read_tools(value: object) -> list[Tool]:
    """Tools in OpenAI's form, as chat templates take them."""
    tools: list[Tool] = []
    for given in read_list(value or [], "tools"):
        function: Any = given.get("function") if isinstance(given, Mapping) else None
        if not isinstance(function, Mapping):
            raise refuse(
                f"a tool must be {{'type': 'function', 'function': ...}}, got {given!r:.80}."
            )
        tools.append(tool_of(function))
    return tools


def tool_of(function: Mapping[str, Any]) -> Tool:
    """A tool of a name, a description and a schema of its parameters."""
    name: Any = function.get("name")
    parameters: Any = function.get("parameters") or {}
    if not isinstance(name, str) or not name or not isinstance(parameters, Mapping):
        raise refuse(f"a tool needs a name, and a schema as its parameters, got {function!r:.80}.")
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    about = {
        "name": name,
        "description": str(function.get("description") or ""),
        "parameters": {**empty, **parameters},
    }
    return {"type": "function", "function": about}


def others(body: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The fields that are not known: the client asks for what has no effect."""
    return {name: value for name, value in body.items() if name not in known}


def require_plain(body: Mapping[str, Any]) -> None:
    """Raise ``RefusedRequest`` for what changes an answer's form, and is not done."""
    if body.get("n") not in (None, 1):
        raise refuse(f"n must be 1, got {body['n']!r:.80}: ask again for another answer.")
    for name in ("logprobs", "top_logprobs", "functions", "best_of", "suffix", "echo"):
        if body.get(name) not in (None, False, 0, 1 if name == "best_of" else None):
            raise refuse(f"{name} is not supported: leave it out.", "unsupported_parameter")
    form: Any = body.get("response_format")
    if form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
        raise refuse(
            f"response_format={form!r:.80} is not supported: the policy writes text, as it is "
            "trained to. Leave it out, and say in the prompt what to write.",
            "unsupported_parameter",
        )


def usage(answer: Answer) -> dict[str, int]:
    """Numbers of tokens of an answer, as OpenAI's API says them."""
    read, total = answer.turn.num_read, int(answer.turn.token_ids.size)
    return {"prompt_tokens": read, "completion_tokens": total - read, "total_tokens": total}


def arguments_of(arguments: Mapping[str, Any]) -> str:
    """Arguments of a call as JSON."""
    return json.dumps(dict(arguments), ensure_ascii=False)


def read_list(value: object, name: str) -> Sequence[Any]:
    """A field that is a list."""
    if not isinstance(value, list):
        raise refuse(f"{name} must be a list, got {value!r:.80}.")
    return value  # pyright: ignore[reportUnknownVariableType] # of a JSON body
