"""Tools, plain and async: how they are run and described."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import InfrastructureError, RolloutError
from sdp_lightning.workflows.environment import BoundedEnvironment
from sdp_lightning.workflows.tool_schema import tool_name, tool_schema
from support.conversations import make, roll, texts
from support.rollouts import DEADLINE_S


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def run(tools: Sequence[Any], text: str, *, timeout_s: float = DEADLINE_S) -> list[str]:
    """What the policy reads of a turn, by way of the workflow's deadline."""
    world = BoundedEnvironment(
        sdp.ToolEnvironment(tools, lambda answer, row: 0.0), timeout_s=timeout_s
    )

    async def play() -> Any:
        await world.reset({"prompt": "?"})
        return await world.step(text)

    return [message["content"] for message in asyncio.run(play()).observation]


# Async --------------------------------------------------------------------------------------------


async def search(query: str, index: str = "all") -> str:
    """Look it up."""
    await asyncio.sleep(0)
    return f"{index}: {query}"


def later(query: str) -> Awaitable[str]:
    """Looks it up, too."""
    return search(query)


class Finder:
    """Finds."""

    async def __call__(self, query: str) -> str:
        return f"found {query}"

    async def find(self, query: str) -> str:
        """Find."""
        return await self(query)


class Ready:
    """An awaitable of no coroutine."""

    def __await__(self) -> Iterator[Any]:
        return search("ready").__await__()


def ready(query: str) -> Any:
    """Is ready."""
    return Ready()


wiki = functools.partial(search, index="wiki")
wiki.__name__ = "wiki"  # type: ignore[attr-defined]
ASYNC = {
    "search": (search, "all: x"),
    "later": (later, "all: x"),
    "Finder": (Finder(), "found x"),
    "find": (Finder().find, "found x"),
    "wiki": (wiki, "wiki: x"),
    "ready": (ready, "all: ready"),
}


@pytest.mark.parametrize("name", ASYNC)
def test_async_tools_of_every_kind_are_awaited(name: str) -> None:
    tool, found = ASYNC[name]
    assert run([tool], call(name, '{"query": "x"}')) == [found]


def test_calls_of_a_turn_run_one_after_another_and_results_keep_their_order() -> None:
    """A plain one that follows an async one runs in a thread, as the first do."""
    order: list[str] = []
    threads: dict[str, bool] = {}

    def plain(name: str) -> str:
        """Plain."""
        order.append(name)
        threads[name] = threading.current_thread() is threading.main_thread()
        return name

    async def slow(name: str) -> str:
        """Async."""
        for _ in range(20):
            await asyncio.sleep(0)
        order.append(name)
        return name

    kinds = {"a": "plain", "b": "slow", "c": "plain", "d": "slow", "e": "slow", "f": "plain"}
    text = "".join(call(kind, f'{{"name": "{name}"}}') for name, kind in kinds.items())
    assert run([plain, slow], text + call("none")) == [
        *kinds,
        "error: there is no 'none' with such arguments; there is ['plain', 'slow']",
    ]
    assert order == list(kinds) and set(threads.values()) == {False}


def test_what_an_async_tool_raises_is_told_and_infrastructure_is_not() -> None:
    async def fails(cause: str) -> str:
        """Fail."""
        if cause == "exit":
            raise SystemExit(3)
        if cause == "down":
            raise InfrastructureError("search is down")
        raise TimeoutError(cause)

    told = run([fails], call("fails", '{"cause": "late"}') + call("fails", '{"cause": "exit"}'))
    assert told == ["error: TimeoutError('late')", "error: SystemExit(3)"]
    with pytest.raises(InfrastructureError, match="search is down"):
        run([fails], call("fails", '{"cause": "down"}'))


def test_a_tool_that_hangs_is_named_at_the_deadline_plain_or_async() -> None:
    release = threading.Event()

    async def hang() -> None:
        """Hang."""
        await asyncio.get_running_loop().create_future()

    def block() -> None:
        """Block."""
        release.wait(DEADLINE_S)

    try:
        for name in ("hang", "block"):
            text = call("find", '{"query": "x"}') + call(name)
            late = rf"^ToolEnvironment\.step\(\) number 1 took longer.*at the tool '{name}'\.$"
            with pytest.raises(RolloutError, match=late):
                run([hang, block, Finder().find], text, timeout_s=0.5)
    finally:
        release.set()


@pytest.mark.parametrize(
    ("result", "read"),
    [
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (["é"], '["é"]'),
        ({1: {2}}, '{"1": "{2}"}'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("text", "text"),
        (None, "None"),
        (0.5, "0.5"),
    ],
)
def test_lists_and_mappings_are_read_as_json(result: object, read: str) -> None:
    def get() -> Any:
        """Get."""
        return result

    assert run([get], call("get")) == [read]


# Arguments ----------------------------------------------------------------------------------------


def test_a_missing_argument_is_told_to_the_policy_by_its_name() -> None:
    (told,) = run([wiki], call("wiki"))
    assert told == "error: TypeError(\"wiki() needs 'query', which is missing\")"


def test_what_is_bound_is_no_argument() -> None:
    assert tool_name(functools.partial(search, index="wiki")) == "search"
    for tool, names in ((wiki, ["query"]), (Finder(), ["query"]), (Finder().find, ["query"])):
        assert list(tool_schema(tool)["function"]["parameters"]["properties"]) == names
    (told,) = run([wiki], call("wiki", '{"query": "x", "index": "secret"}'))
    assert "wiki() has no parameter 'index'; it has ['query']" in told
    assert tool_schema(Finder())["function"]["description"] == "Finds."


# Prompts ------------------------------------------------------------------------------------------

RULES, ASK = {"role": "system", "content": "RULES"}, {"role": "user", "content": "1+1?"}
PARTS = [{"type": "text", "text": "RULES"}]


@pytest.mark.parametrize(
    ("prompt", "system"),
    [("1+1?", None), (ASK, None), ([RULES, ASK], "RULES"), ((RULES, ASK), "RULES")],
    ids=str,
)
def test_there_is_one_system_message_with_the_rows_rules_and_the_tools(
    prompt: Any, system: str | None
) -> None:
    tools = sdp.ToolEnvironment([search], lambda answer, row: 0.0)
    first, *rest = tools.reset({"prompt": prompt})
    assert first["role"] == "system" and rest == [ASK]
    assert "- search(query: str, index: str = all) -> str: Look it up." in first["content"]
    assert first["content"].startswith("RULES\n\n" if system else "You may call")
    assert RULES["content"] == "RULES", "the row is not changed"


def test_a_system_message_in_parts_keeps_them() -> None:
    tools = sdp.ToolEnvironment([search], lambda answer, row: 0.0)
    first, *_ = tools.reset({"prompt": [{"role": "developer", "content": PARTS}, ASK]})
    own, described = first["content"]
    assert own == PARTS[0] and "search(query" in described["text"]


# Prompts that are text ----------------------------------------------------------------------------


def test_a_prompt_that_is_text_stays_text_with_a_turn_format() -> None:
    """Also where the tokenizer has a chat template, which would write the prompt alone."""

    def environment() -> sdp.Environment:
        return sdp.ToolEnvironment([search], lambda answer, row: 1.0)

    [trajectory, _] = roll(make(environment))
    _, prompt = texts(trajectory)[0]
    assert prompt.startswith("You may call these functions") and "Look it up." in prompt
    assert prompt.endswith("A turn without a call is your answer.\n\n0+0=")
    with pytest.raises(RolloutError, match=r"row has no 'prompt'; its keys are \['question'\]"):
        environment().reset({"question": "?"})
