"""An environment of tools: the policy calls functions, reads what they return, and answers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdp_lightning.errors import ConfigError
from sdp_lightning.types import Row
from sdp_lightning.workflows.environment import Environment, Message, StepResult

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_LONGEST = 2000  # characters of a result that the policy reads
_HOW = """You may call these functions, as often as you like:
{functions}
To call one, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call> and end your turn. \
A turn without a call is your answer."""


class ToolEnvironment(Environment):
    """Runs the tool calls of a turn; a turn without one is the answer, which ``reward`` scores.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Qwen's and Hermes'
    chat templates write it. The result of a failed call is ``error: ...``.

    Args:
        tools: functions with docstrings, which the policy may call by name.
        reward: ``reward(completion, row) -> float`` of the answer.
        prompt_key: key of the prompt in a row: text or messages; a list of the tools precedes it.
        result_role: role of the message that holds a result, for chat templates.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., object]],
        reward: Callable[[str, Row], float],
        *,
        prompt_key: str = "prompt",
        result_role: str = "tool",
    ) -> None:
        # foreign: a callable may have no name
        self._tools = {str(getattr(tool, "__name__", tool)): tool for tool in tools}
        if len(self._tools) < len(tools) or not tools:
            raise ConfigError(f"tools must be functions of different names, got {list(tools)!r}.")
        self._reward, self._prompt_key, self._role = reward, prompt_key, result_role
        self._row: Row = {}

    def reset(self, row: Row) -> list[Message]:
        """A system message that lists the tools, then the prompt of ``row``."""
        self._row = row
        prompt = row[self._prompt_key]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        functions = "\n".join(_describe(name, tool) for name, tool in self._tools.items())
        return [{"role": "system", "content": _HOW.format(functions=functions)}, *asked]

    def step(self, completion: str) -> StepResult:
        """The results of the calls in ``completion``, or the reward of an answer."""
        calls = _CALL.findall(completion)
        if not calls:
            return StepResult("", self._reward(completion, self._row), True)
        results = [{"role": self._role, "content": self._run(call)} for call in calls]
        return StepResult(results)

    def _run(self, call: str) -> str:
        try:
            wanted: Any = json.loads(call)
            name, arguments = wanted["name"], wanted.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"error: the call is no JSON of a name and arguments ({error!r})"
        if name not in self._tools or not isinstance(arguments, Mapping):
            return f"error: there is no {name!r} with such arguments; there is {list(self._tools)}"
        try:
            return str(self._tools[name](**arguments))[:_LONGEST]
        except Exception as error:  # told to the policy, whose arguments they were
            return f"error: {error!r}"[:_LONGEST]


def _describe(name: str, tool: Callable[..., object]) -> str:
    signature = str(inspect.signature(tool)).replace("'", "")  # of annotations that are strings
    return f"- {name}{signature}: {inspect.getdoc(tool) or ''}"
