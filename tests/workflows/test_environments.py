"""Environments that fail, and tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardRejected
from sdp_lightning.testing import FakeEngine
from sdp_lightning.workflows.environment import BoundedEnvironment
from support.conversations import ROWS, Counts, make, roll
from support.rollouts import DEADLINE_S, rolling, wait_until
from support.waiting import wait_for


class Broken(Counts):
    def step(self, completion: str) -> Any:
        if self.turn == 1:
            raise ZeroDivisionError("no digits")
        return super().step(completion)


class BrokenReset(Counts):
    def reset(self, row: Mapping[str, Any]) -> Any:
        raise KeyError("board")


class NoTuple(Counts):
    def step(self, completion: str) -> Any:
        return "well done"


class Swapped(Counts):
    def step(self, completion: str) -> Any:
        return "", True, 1.0


class NotFinite(Counts):
    def step(self, completion: str) -> Any:
        return "", float("nan"), True


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Broken, r"Broken\.step\(\) number 2 failed: ZeroDivisionError"),
        (BrokenReset, r"BrokenReset\.reset\(\) failed: KeyError"),
        (NoTuple, r"number 1 returned 'well done'; it must be a tuple"),
        (Swapped, r"returned done=1\.0; it must be a bool"),
        (NotFinite, r"reward 'NotFinite\.step' returned nan"),
        (lambda: 7, r"must make a sdp_lightning\.Environment; it made 7"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_environment_that_fails_is_named_with_row_and_step(
    environment: Any, message: str
) -> None:
    with rolling(FakeEngine(), make(environment), rows=ROWS) as executor:
        with pytest.raises(RolloutError, match=rf"row 'r\d'.*{message}"):
            executor.take()
        assert executor.stat.failed >= 1


class Returns(sdp.Environment):
    """Returns what it was made of."""

    def __init__(self, opening: Any = "?", result: Any = ("", 1.0, True)) -> None:
        self.opening, self.result = opening, result

    def reset(self, row: Mapping[str, Any]) -> Any:
        return self.opening

    def step(self, completion: str) -> Any:
        return self.result


def say(opening: Any = "?", result: Any = ("", 1.0, True)) -> tuple[Any, Any, BoundedEnvironment]:
    """What ``reset`` and ``step`` of an environment are taken as."""
    world = BoundedEnvironment(Returns(opening, result), timeout_s=DEADLINE_S)

    async def play() -> tuple[Any, Any]:
        return await world.reset({}), await world.step("x")

    return *asyncio.run(play()), world


ASK, TOOL = {"role": "user", "content": "2+2?"}, {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("result", "taken", "is_truncated"),
    [
        (("o", np.float32(0.5), np.bool_(False)), ("o", 0.5, False), False),
        (("o", np.array(0.5), np.array(True)), ("o", 0.5, True), False),
        (("o", torch.tensor(0.5), torch.tensor(False)), ("o", 0.5, False), False),
        ((np.str_("o"), np.int64(2), False), ("o", 2.0, False), False),
        ((TOOL, 0, False), ([TOOL], 0.0, False), False),
        (((TOOL, TOOL), 0, False), ([TOOL, TOOL], 0.0, False), False),
        ((np.array([TOOL]), 0, False), ([TOOL], 0.0, False), False),
        ((None, 1, True), (None, 1.0, True), False),
        (("o", 1, False, False, {}), ("o", 1.0, False), False),
        (("o", 1, np.bool_(True), np.bool_(True), {}), ("o", 1.0, True), False),
        (("o", 1, False, np.bool_(True), {}), ("o", 1.0, True), True),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_step_may_return_scalars_of_any_library_messages_and_five_values(
    result: Any, taken: Any, is_truncated: bool
) -> None:
    _, step, world = say(result=result)
    assert step == taken and [type(value) for value in step[1:]] == [float, bool]
    assert world.is_truncated is is_truncated


@pytest.mark.parametrize(
    ("opening", "taken"),
    [
        (ASK, [ASK]),
        ((ASK,), [ASK]),
        (np.array([ASK, TOOL]), [ASK, TOOL]),
        (np.array("?"), "?"),
        (("?", {"seed": 3}), "?"),
        ((ASK, {}), [ASK]),
        ((ASK, TOOL), [ASK, TOOL]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_reset_may_return_messages_and_an_info(opening: Any, taken: Any) -> None:
    assert say(opening)[0] == taken


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"opening": np.array([3, 4])}, r"Returns\.reset\(\): the prompt \[3, 4\] is neither text"),
        ({"opening": None}, r"Returns\.reset\(\): the prompt None is neither text nor a list of"),
        ({"result": (3, 0, False)}, r"step\(\) number 1: the observation 3 is neither text nor a"),
        (
            {"result": ("", "a lot", True)},
            r"number 1: reward .* returned 'a lot'; it must be a num",
        ),
        ({"result": ("", np.ones(1), True)}, r"number 1: reward .* returned \[1\.0\]; it must be"),
        ({"result": ("", 0, 1)}, r"number 1 returned done=1; it must be a bool"),
        ({"result": ("", 0, np.array([True]))}, r"done=\[True\]; it must be a bool"),
        ({"result": ("", 0, False, 3, {})}, r"terminated or truncated=3; it must be a bool"),
        ({"result": ("", 0, True, {})}, r"number 1 returned \('', 0, True, {}\); it must be a tup"),
        ({"result": {"reward": 1}}, r"number 1 returned {'reward': 1}; it must be a tuple"),
        ({"result": ("x" * 10**6,)}, r"returned \('x{100,200}\.\.\.; it must be a tuple"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_anything_else_is_named_with_environment_and_step(returned: Any, message: str) -> None:
    with pytest.raises(RolloutError, match=message) as caught:
        say(**returned)
    assert "\n" not in str(caught.value)


def test_a_conversation_that_an_environment_truncates_counts_as_cut_off() -> None:
    for ends, reason in (((False, True), "length"), ((True, True), "stop")):
        workflow = make(lambda ends=ends: Returns(result=("", 0.5, *ends, {})))
        assert {(t.finish_reason, t.reward) for t in roll(workflow)} == {(reason, 0.5)}


def test_an_environment_that_hangs_fails_its_group_at_the_deadline_and_others_go_on() -> None:
    release, closed = threading.Event(), list[str]()

    class Hangs(Counts):
        def reset(self, row: Mapping[str, Any]) -> Any:
            self.row = row["id"]
            return super().reset(row)

        def step(self, completion: str) -> Any:
            if self.row == "r0" and self.turn == 1:
                release.wait(DEADLINE_S)
            return super().step(completion)

        def close(self) -> None:
            closed.append(self.row)

    workflow = make(Hangs, step_timeout_s=0.3)
    settings: dict[str, Any] = {"num_epochs": 1, "max_failures": 1, "batch_size": 4}
    try:
        with rolling(FakeEngine(), workflow, rows=ROWS[:5], **settings) as executor:
            batch = executor.take()
            assert batch is not None and "r0" not in {group.row_id for group in batch}
            wait_until(executor, lambda: executor.stat.failed == 1)
            wait_for(lambda: len(closed) == 10)  # one is cancelled while its thread closes it
            assert sorted(closed) == sorted([f"r{i}" for i in range(5)] * 2), "all were closed"
    finally:
        release.set()


def test_an_environment_may_reject_its_group() -> None:
    class Rejects(Counts):
        def step(self, completion: str) -> Any:
            raise RewardRejected("no verdict")

    with rolling(FakeEngine(), make(Rejects), rows=ROWS, num_epochs=1) as executor:
        assert executor.take() is None
        assert executor.telemetry.rejections == {"a reward could not be had": 10}


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


def make_tools() -> sdp.ToolEnvironment:
    return sdp.ToolEnvironment([add], lambda answer, row: float(answer == row["answer"]))


def test_tools_are_said_called_and_answered() -> None:
    tools = make_tools()
    system, user = tools.reset({"prompt": "1+2?", "answer": "3"})
    assert "- add(a: int, b: int) -> int: The sum." in system["content"]
    assert user == {"role": "user", "content": "1+2?"}
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": %s}}</tool_call>'
    results, reward, done = tools.step(call % 2 + call % '"x"')
    assert (reward, done) == (0.0, False)
    first, second = (message["content"] for message in results)  # type: ignore[call-overload]
    assert first == "3" and "error: TypeError" in second
    assert tools.step("3") == ("", 1.0, True)
    assert tools.step("4") == ("", 0.0, True)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("add(1, 2)", "is no JSON"),
        ("[1]", "is no JSON of a name and arguments"),
        ('{"arguments": {}}', "is no JSON of a name"),
        ('{"name": "sub", "arguments": {}}', r"there is no 'sub' .*\['add'\]"),
        ('{"name": "add", "arguments": 3}', "there is no 'add' with such arguments"),
    ],
)
def test_a_call_that_is_wrong_is_told_to_the_policy(call: str, told: str) -> None:
    import re

    tools = make_tools()
    tools.reset({"prompt": "1+2?"})
    (result,), _, _ = tools.step(f"<tool_call>{call}</tool_call>")
    assert re.search(told, result["content"])  # type: ignore[index]


def test_tools_without_names_of_their_own_are_refused() -> None:
    for tools in ([], [add, add]):
        with pytest.raises(ConfigError, match="different names"):
            sdp.ToolEnvironment(tools, lambda answer, row: 0.0)
