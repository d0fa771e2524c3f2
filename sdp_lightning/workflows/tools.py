"""An environment of tools: the policy calls functions, reads what they return, and answers.

What the policy wrote is data here: calls are found in one pass and read as JSON, and whatever is
wrong with one is told to the policy. The tools themselves run in the trainer's process.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from sdp_lightning.errors import ConfigError, InfrastructureError
from sdp_lightning.rewards.foreign_code import refuse_without_workers
from sdp_lightning.rewards.text import between_tags
from sdp_lightning.types import Row
from sdp_lightning.workflows.environment import Environment, Message, StepResult

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_LONGEST = 2000  # characters of a result that the policy reads
_HOW = """You may call these functions, as often as you like:
{functions}
To call one, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call> and end your turn. \
A turn without a call is your answer."""


class ToolEnvironment(Environment):
    """Runs the tool calls of a turn; a turn without one is the answer, which ``reward`` scores.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Qwen's and Hermes'
    chat templates write it. The result of a failed call is ``error: ...``; an
    ``InfrastructureError`` of a tool leaves the sample out of its group instead.

    A tool runs in a thread of the trainer, with arguments that the policy chose: it must not
    evaluate them, and must return whatever they are. Code that a model wrote belongs in a process
    that can be killed, which the tool starts.

    Args:
        tools: functions with docstrings, which the policy may call by name.
        reward: ``reward(completion, row) -> float`` of the answer, plain or async. A ``RewardPool``
            that all environments share runs it in processes that can be killed, within the
            workflow's ``step_timeout_s``.
        prompt_key: key of the prompt in a row: text or messages; a list of the tools precedes it.
        result_role: role of the message that holds a result, for chat templates.
        max_calls: number of calls that are run in one turn; the others are told to be too many.

    Raises:
        ConfigError: if tools share a name, or reward or a tool runs in worker processes only.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., object]],
        reward: Callable[[str, Row], float | Awaitable[float]],
        *,
        prompt_key: str = "prompt",
        result_role: str = "tool",
        max_calls: int = 32,
    ) -> None:
        # foreign: a callable may have no name
        self._tools = {str(getattr(tool, "__name__", tool)): tool for tool in tools}
        if len(self._tools) < len(tools) or not tools:
            raise ConfigError(f"tools must be functions of different names, got {list(tools)!r}.")
        if max_calls < 1:
            raise ConfigError(f"max_calls must be at least 1, got {max_calls}.")
        refuse_without_workers(reward, "pass a RewardPool, made once for all environments")
        for tool in tools:
            refuse_without_workers(tool, "a tool is called in the trainer's process")
        self._reward, self._prompt_key, self._role = reward, prompt_key, result_role
        self._max_calls = max_calls
        self._row: Row = {}

    def reset(self, row: Row) -> list[Message]:
        """A system message that lists the tools, then the prompt of ``row``."""
        self._row = row
        prompt = row[self._prompt_key]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        functions = "\n".join(_describe(name, tool) for name, tool in self._tools.items())
        return [{"role": "system", "content": _HOW.format(functions=functions)}, *asked]

    def step(self, completion: str) -> StepResult | Awaitable[StepResult]:
        """The results of the calls in ``completion``, or the reward of an answer."""
        calls = between_tags(completion, _OPENING, _CLOSING)
        if not calls:
            reward = self._reward(completion, self._row)
            return _when_known(reward) if isinstance(reward, Awaitable) else _end(reward)
        results = [self._run(call)[:_LONGEST] for call in calls[: self._max_calls]]
        if len(calls) > self._max_calls:
            results.append(f"error: of {len(calls)} calls, only {self._max_calls} were run")
        return StepResult([{"role": self._role, "content": result} for result in results])

    def _run(self, call: str) -> str:
        try:
            wanted: Any = json.loads(call)
            name, arguments = wanted["name"], wanted.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"error: the call is no JSON of a name and arguments ({_shown(error)})"
        if not isinstance(name, str):
            return f"error: the name must be a text; it is {type(name).__name__}"
        if name not in self._tools or not isinstance(arguments, Mapping):
            shown = repr(name[:_LONGEST])
            return f"error: there is no {shown} with such arguments; there is {list(self._tools)}"
        try:
            return str(self._tools[name](**arguments))
        except InfrastructureError:
            raise
        except (Exception, SystemExit) as error:  # told to the policy, whose arguments they were
            return f"error: {_shown(error)}"


def _end(reward: float) -> StepResult:
    return StepResult("", reward, True)


async def _when_known(reward: Awaitable[float]) -> StepResult:
    return _end(await reward)


def _shown(error: BaseException) -> str:
    """``repr(error)``, or its type: an error may hold what cannot be shown, such as deep lists."""
    try:
        return repr(error)
    except (RecursionError, ValueError):
        return type(error).__name__


def _describe(name: str, tool: Callable[..., object]) -> str:
    signature = str(inspect.signature(tool)).replace("'", "")  # of annotations that are strings
    return f"- {name}{signature}: {inspect.getdoc(tool) or ''}"
