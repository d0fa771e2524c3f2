"""Calls of tools in thoughts are none; what stands in a call is no thought."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.workflows import tool_format
from sdp_lightning.workflows.environment import Transcript
from support.rollouts import CodePoints

CALL = '<tool_call>{"name": "echo", "arguments": {"text": "SAID"}}</tool_call>'
JSON = '{"name": "echo", "arguments": {"text": "SAID"}}'
MISTRAL = '[TOOL_CALLS]echo[ARGS]{"text": "SAID"}'


def echo(text: str) -> str:
    """The text."""
    return text


def step(turn: str, name: str, before: str = "") -> Any:
    """What the policy reads next; True if the turn was the answer."""
    tools: Any = sdp.ToolEnvironment([echo], lambda answer, row: 1.0, tool_call_format=name)
    tokenizer = CodePoints()
    transcript = Transcript(tokenizer)
    tools.begin(transcript)
    transcript.hear(turn, tokenizer.encode(turn), tokenizer.encode(before))
    observation, _, done = tools.step(turn)
    return done or [message["content"] for message in observation]


def call(said: str, form: str = CALL) -> str:
    return form.replace("SAID", said)


@pytest.mark.parametrize(
    ("name", "turn", "before", "told"),
    [
        ("hermes", f"<think>{call('a')}</think>3", "", True),
        ("hermes", f"<think>{call('a')}</think>{call('b')}", "", ["b"]),
        ("hermes", f"So: <think>{call('a')}", "", True),
        ("hermes", f"{call('a')}</think>3", "<|assistant|><think>\n", True),
        ("hermes", call("a"), "<|assistant|><think>\n", True),
        ("hermes", call("a"), "<think> is a tag. <|assistant|>", ["a"]),
        ("hermes", f"I call? {call('a')}</think>{call('b')}", "", ["b"]),
        ("hermes", call("<think>a</think>"), "", ["<think>a</think>"]),
        ("hermes", call("</think>"), "", ["</think>"]),
        ("hermes", f"{call('<think>')}<think>{call('a')}</think>", "", ["<think>"]),
        ("hermes", f"<seed:think>{call('a')}</seed:think>{call('b')}", "", ["b"]),
        ("hermes", f"◁think▷{call('a')}◁/think▷3", "", True),
        ("llama3", f"<think>so</think>\n{call('a', JSON)}", "", ["a"]),
        ("json", call("<think>a", JSON), "", ["<think>a"]),
        ("json", call("a</think>", JSON), "", ["a</think>"]),
        ("mistral", f"[THINK]{call('a', MISTRAL)}[/THINK]{call('b', MISTRAL)}", "", ["b"]),
        ("mistral", call("[THINK]", MISTRAL), "", ["[THINK]"]),
    ],
)
def test_a_call_in_a_thought_is_none(name: str, turn: str, before: str, told: Any) -> None:
    assert step(turn, name, before) == told


def test_that_a_call_in_a_thought_is_not_run_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tool_format._say_thought.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert step(f"<think>{call('a')}</think>3", "hermes") is True
        assert step("<think>a</think>3", "hermes") is True
    [message] = caplog.messages
    assert "a call of a tool within a thought (<think>) is not run" in message


def test_a_result_that_is_cut_says_so() -> None:
    tools: Any = sdp.ToolEnvironment([echo], lambda a, r: 1.0, max_result_characters=40)
    for size, content in ((40, "x" * 40), (41, "x" * 9 + "... [cut: 41 characters in all]")):
        [message], _, _ = tools.step(call("x" * size))
        assert message["content"] == content and len(content) == 40
