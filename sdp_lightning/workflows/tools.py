"""An environment of tools: the policy calls functions, reads what they return, and answers.

What the policy wrote is data here: calls are found in one pass and read as JSON, and whatever is
wrong with one is told to the policy. The tools themselves run in the trainer's process.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from sdp_lightning.errors import ConfigError, InfrastructureError
from sdp_lightning.rewards.foreign_code import refuse_without_workers
from sdp_lightning.rewards.timeouts import call_with_timeout
from sdp_lightning.types import Row
from sdp_lightning.workflows.chat_template import prompt_of
from sdp_lightning.workflows.environment import (
    Environment,
    Message,
    StepResult,
    Transcript,
    shown,
)
from sdp_lightning.workflows.tool_calls import ToolCall
from sdp_lightning.workflows.tool_format import check_format, find_format, shows_tools
from sdp_lightning.workflows.tool_schema import Schema, Tool, read_arguments, tool_name, tool_schema

logger = logging.getLogger(__name__)

_LONGEST_S = 1e9  # of one call of several: the deadline of the whole step ends it
_WHAT = "You may call these functions, as often as you like:\n{functions}\n"
_HOW = "To call one, write {example} and end your turn. A turn without a call is your answer."


class ToolEnvironment(Environment):
    """Runs the tool calls of a turn; a turn without one is the answer, which ``reward`` scores.

    The calls of a turn run one after another, and each result is a message that the policy reads.
    The result of a call that failed, or that is wrong, is ``error: ...``; an
    ``InfrastructureError`` of a tool leaves the sample out of its group instead. Tools that the
    chat template does not show are described in the system message.

    A plain tool runs in a thread of the trainer, an async one is awaited, within the workflow's
    ``step_timeout_s`` for all calls of a turn. Arguments are of the types that the tool declares,
    but chosen by the policy: a tool must not evaluate them, and must return whatever they are. Code
    that a model wrote belongs in a process that can be killed, which the tool starts.

    Args:
        tools: functions with docstrings, plain or async, which the policy may call by name.
        reward: ``reward(completion, row) -> float`` of the answer, plain or async. A ``RewardPool``
            that all environments share runs it in processes that can be killed, within the
            workflow's ``step_timeout_s``.
        prompt_key: key of the prompt in a row: text or messages.
        result_role: role of the message that holds a result, for chat templates.
        max_calls: number of calls that are run in one turn; the others are told to be too many.
        max_result_characters: length of a result that the policy reads. It is told of a cut.
        tool_call_format: how the policy writes calls: ``"hermes"`` (also Qwen, GLM), ``"llama3"``,
            ``"mistral"``, ``"harmony"`` (gpt-oss), ``"json"``, or a response template of
            transformers. ``"auto"``: as the tokenizer's response template or chat template does.

    Raises:
        ConfigError: if tools share a name or have no JSON schema, the format is unknown, or reward
            or a tool runs in worker processes only.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        reward: Callable[[str, Row], float | Awaitable[float]],
        *,
        prompt_key: str = "prompt",
        result_role: str = "tool",
        max_calls: int = 32,
        max_result_characters: int = 2000,
        tool_call_format: str | Mapping[str, Any] = "auto",
    ) -> None:
        self._tools = {tool_name(tool): tool for tool in tools}
        if len(self._tools) < len(tools) or not tools:
            raise ConfigError(f"tools must be functions of different names, got {list(tools)!r}.")
        if max_calls < 1 or max_result_characters < 1:
            raise ConfigError(
                "max_calls must be at least 1, and max_result_characters, too: got "
                f"{max_calls} and {max_result_characters}."
            )
        check_format(tool_call_format)
        refuse_without_workers(reward, "pass a RewardPool, made once for all environments")
        for tool in tools:
            refuse_without_workers(tool, "a tool is called in the trainer's process")
        self._schemas: dict[str, Schema] = {n: tool_schema(t) for n, t in self._tools.items()}
        self._all_schemas = list(self._schemas.values())
        self._reward, self._prompt_key, self._role = reward, prompt_key, result_role
        self._max_calls, self._max_result = max_calls, max_result_characters
        self._format_name = tool_call_format
        self._format = find_format(tool_call_format, None, self._all_schemas)
        self._transcript: Transcript | None = None
        self._row: Row = {}
        self._num_calls = 0
        self._is_shown = False  # by the chat template

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools; none if the prompt describes them already."""
        is_described = self._transcript is not None and not self._is_shown
        return () if is_described else self._all_schemas

    def begin(self, transcript: Transcript) -> None:
        """Learn from the tokenizer how calls are written."""
        self._transcript = transcript
        self._format = find_format(self._format_name, transcript, self._all_schemas)

    def reset(self, row: Row) -> str | list[Message]:
        """The prompt of ``row``; its system message describes tools that nothing else shows.

        A text that no chat template writes stays one, and follows what describes them.
        """
        self._row, self._num_calls = row, 0
        prompt: Any = prompt_of(row, self._prompt_key)
        transcript = self._transcript
        if isinstance(prompt, str) and transcript is not None and not transcript.is_chat:
            return f"{self._described()}\n\n{prompt}"
        if isinstance(prompt, str | Mapping):
            prompt = [{"role": "user", "content": prompt} if isinstance(prompt, str) else prompt]
        messages: list[Message] = [dict(message) for message in prompt]
        if transcript is not None and self._format.is_templates is not False:
            self._is_shown = shows_tools(transcript.tokenizer, self._all_schemas, messages)
        if self._is_shown and self._format.is_templates:
            return messages
        return _with_system(messages, self._described())

    def _described(self) -> str:
        """How calls are written and, unless the chat template shows them, what tools there are."""
        how = _HOW.replace("{example}", self._format.example)
        if self._is_shown:
            return how.replace("one", "a function", 1)
        functions = "\n".join(_describe(name, tool) for name, tool in self._tools.items())
        return _WHAT.replace("{functions}", functions) + how

    def step(self, completion: str) -> StepResult | Awaitable[StepResult]:
        """The results of the calls in ``completion``, or the reward of an answer."""
        written, before = completion, ""
        if self._transcript is not None:
            written = self._transcript.with_special_tokens(completion)
            before = self._transcript.before(30)
        calls = self._format.calls(written, before)
        if not calls:
            self.activity = "the reward"
            reward = self._reward(completion, self._row)
            return _when_known(reward) if isinstance(reward, Awaitable) else _end(reward)
        extra = f"error: of {len(calls)} calls, only {self._max_calls} were run"
        last = [self._message(calls[-1], extra)] if len(calls) > self._max_calls else []
        return self._run(calls[: self._max_calls], last)

    def _run(
        self, calls: Sequence[ToolCall], last: list[Message]
    ) -> StepResult | Awaitable[StepResult]:
        results: list[Message] = []
        for index, call in enumerate(calls):
            result = self._start(call)
            if not isinstance(result, str):
                return self._run_rest(result, calls[index:], results, last)
            results.append(self._message(call, result))
        return StepResult([*results, *last])

    async def _run_rest(
        self,
        first: Awaitable[str],
        calls: Sequence[ToolCall],
        results: list[Message],
        last: list[Message],
    ) -> StepResult:
        """The results of ``calls``, the first of which has begun; plain tools run in threads."""
        results.append(self._message(calls[0], await first))
        for call in calls[1:]:
            what = f"the tool {shown(call.name)}"
            text = await call_with_timeout(self._start, call, timeout_s=_LONGEST_S, what=what)
            results.append(self._message(call, text))
        return StepResult([*results, *last])

    def _start(self, call: ToolCall) -> str | Awaitable[str]:
        """The result of a call, or its error, as the policy reads it."""
        self.activity = f"the tool {shown(call.name)}"
        name = call.name
        if call.error:
            return f"error: {call.error}"
        if name not in self._tools or not isinstance(call.arguments, Mapping):
            known = list(self._tools)
            return f"error: there is no {shown(name)} with such arguments; there is {known}"
        try:
            arguments = read_arguments(
                self._schemas[name], call.arguments, are_texts=call.are_texts
            )
            result = self._tools[name](**arguments)
            return _awaited(result) if inspect.isawaitable(result) else _text_of(result)
        except InfrastructureError:
            raise
        except (Exception, SystemExit) as error:  # told to the policy, whose arguments they were
            return f"error: {shown(error)}"

    def _message(self, call: ToolCall, content: str) -> Message:
        """A result as a message, with the keys by which families tell whose it is."""
        self._num_calls += 1
        has_id = len(call.id) == 9 and call.id.isascii() and call.id.isalnum()  # as of Mistral
        return {
            "role": self._role,
            "content": self._shortened(content),
            "name": call.name if call.name in self._tools else "unknown",
            "tool_call_id": call.id if has_id else f"{self._num_calls:09}",
        }

    def _shortened(self, text: str) -> str:
        """``text``, or as much of it as the policy reads, and a note of what is left out."""
        if len(text) <= self._max_result:
            return text
        _say_cut(self._max_result)
        note = f"... [cut: {len(text)} characters in all]"
        return text[: max(self._max_result - len(note), 0)] + note


@functools.cache
def _say_cut(most: int) -> None:
    text = "results of tools are cut to %d characters, which the policy is told each time: set "
    logger.warning(text + "max_result_characters", most)


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """``messages`` with ``text`` in their one system message, after what it says itself."""
    for index, message in enumerate(messages):
        if message.get("role") in ("system", "developer"):
            said: Any = message.get("content") or ""
            more = f"\n\n{text}" if said else text
            whole = (
                said + more if isinstance(said, str) else [*said, {"type": "text", "text": more}]
            )
            return [*messages[:index], {**message, "content": whole}, *messages[index + 1 :]]
    return [{"role": "system", "content": text}, *messages]


def _end(reward: float) -> StepResult:
    return StepResult("", reward, True)


async def _when_known(reward: Awaitable[float]) -> StepResult:
    return _end(await reward)


async def _awaited(result: Awaitable[object]) -> str:
    try:
        return _text_of(await result)
    except InfrastructureError:
        raise
    except (Exception, SystemExit) as error:
        return f"error: {shown(error)}"


def _text_of(result: object) -> str:
    """A result as a text: lists and mappings as JSON, where they have a form in it."""
    if isinstance(result, dict | list | tuple):
        try:
            return json.dumps(result, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def _describe(name: str, tool: Tool) -> str:
    signature = str(inspect.signature(tool)).replace("'", "")  # of annotations that are strings
    return f"- {name}{signature}: {inspect.getdoc(tool) or ''}"
