"""Tool calls that mean harm are told to the policy as errors; no group fails, no run ends."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import Context, SamplingParams
from sdp_lightning.workflows.chat_template import encodable

LONGEST = 2000  # characters of a result that the policy reads


def add(a: int = 0, b: int = 0) -> int:
    """The sum."""
    return a + b


def say(text: str) -> str:
    """The same text."""
    return text


def refuse(value: object) -> None:
    """Raises what it was given."""
    raise ValueError(value)


def leave() -> None:
    """Ends its thread."""
    raise SystemExit(3)


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


def call_of(name: object, **arguments: object) -> str:
    return call(json.dumps({"name": name, "arguments": arguments}))


DEEP: Any = 0
for _ in range(900):  # read as JSON, but not shown
    DEEP = [DEEP]

CALLS = {
    "deep JSON": (call("[" * 100_000), "RecursionError"),
    "deeper objects": (call('{"a":' * 100_000), "RecursionError"),
    "a name that is a list": (call_of(["add"]), "must be a text; it is list"),
    "a name that is an object": (call_of({}), "must be a text; it is dict"),
    "a name that is a number": (call_of(3), "must be a text; it is int"),
    "a name of a megabyte": (call_of("x" * 10**6), "there is no 'xxx"),
    "a name that is a lone surrogate": (call_of("\ud800"), r"there is no '\ud800'"),
    "a huge integer": (call('{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}"), "4300"),
    "a sum that cannot be written": (call_of("add", a=10**4299 * 9, b=10**4299 * 9), "4300"),
    "a lone surrogate": (call_of("say", text="a\ud800b"), "a\ud800b"),
    "NUL": (call_of("say", text="\0"), "\0"),
    "ten megabytes": (
        call_of("say", text="x" * 10**7),
        "x" * (LONGEST - 37) + "... [cut: 10000000 characters in all]",
    ),
    "what cannot be shown": (call_of("refuse", value=DEEP), "ValueError"),
    "a tool that exits": (call_of("leave"), "SystemExit(3)"),
    "no JSON": (call("{"), "is no JSON"),
    "no such tool": (call_of("rm"), "there is no 'rm'"),
}


class Scripted(sdp.ToolEnvironment):
    """Gets ``text`` for a first turn, whatever was sampled."""

    text = ""

    def step(self, completion: str) -> Any:
        turn, self.text = self.text or "7", ""
        return super().step(turn)


@pytest.mark.fault("exception", "completion")
@pytest.mark.fault("corrupted data", "completion")
@pytest.mark.parametrize(("text", "told"), CALLS.values(), ids=CALLS)
def test_a_hostile_call_is_told_to_the_policy_and_the_rollout_goes_on(text: str, told: str) -> None:
    def environment() -> sdp.ToolEnvironment:
        made = Scripted([add, say, refuse, leave], lambda answer, row: float(answer == "7"))
        made.text = text
        return made

    alone: Any = environment()
    alone.reset({"prompt": "1+1="})
    [result] = alone.step("").observation
    assert told in result["content"] and len(result["content"]) <= LONGEST

    workflow = sdp.MultiTurnWorkflow(
        environment,
        group_size=1,
        sampling=SamplingParams(max_new_tokens=4),
        max_turns=2,
    )
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    engine = FakeEngine()
    executor = create_workflow_executor(
        config=sdp.RolloutConfig(batch_size=1, max_head_lag=0, timeout_s=60),
        engine=engine,
        workflow=workflow,
        prompts=[{"id": "r0", "prompt": "1+1="}],
        tokenizer=tokenizer,
    )
    with closing(executor), closing(engine):
        engine.start()
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
        [trajectory] = group.trajectories
        assert trajectory.reward == 1.0, "the second turn was the answer"
        contexts = [part for part in trajectory.parts if isinstance(part, Context)]
        said = tokenizer.encode(f"\n{encodable(result['content'])}\n", add_special_tokens=False)
        assert contexts[1].token_ids.tolist() == said


def test_calls_beyond_the_most_are_said_to_be_too_many() -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0, max_calls=2)
    result: Any = tools.step(call_of("add", a=1) * 30_000)
    first, second, rest = (message["content"] for message in result.observation)
    assert (first, second, rest) == ("1", "1", "error: of 30000 calls, only 2 were run")
    with pytest.raises(ConfigError, match=r"max_calls must be at least 1, .*: got 0 and 2000"):
        sdp.ToolEnvironment([add], lambda answer, row: 0.0, max_calls=0)


def test_a_tag_without_an_end_is_an_answer() -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.5)
    assert tools.step("<tool_call>" * 30_000) == ("", 0.5, True)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [("na\u00efve", "na\u00efve"), ("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "\U0001f600")],
)
def test_lone_surrogates_alone_are_replaced(text: str, encoded: str) -> None:
    assert encodable(text) == encoded
    tiny_tokenizer().encode(encodable(text))
