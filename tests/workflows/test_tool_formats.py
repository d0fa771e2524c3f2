"""Calls of tools in the formats of the model families: well written, ill written, and found out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.workflows import tool_calls
from sdp_lightning.workflows.tool_format import FORMATS
from support.counted_work import Count, CountedText, counting
from support.hostile_completions import PIECES as HOSTILE

ARGUMENTS = {"a": 1, "b": 2}
BODY = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
PARAMETERS = BODY.replace("arguments", "parameters")
HARMONY = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


# Texts --------------------------------------------------------------------------------------------

CODER = (
    "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>"
)
GLM = (
    "add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n"
)
NAMED = f"[TOOL_CALLS]add[ARGS]{json.dumps(ARGUMENTS)}"
WRITTEN = {
    "Hermes": ("hermes", f"I add. <tool_call>\n{BODY}\n</tool_call> Then?", 1),
    "Hermes, twice": ("hermes", f"<tool_call>{BODY}</tool_call>" * 2, 2),
    "OpenAI's form": ("hermes", f'<tool_call>{{"function": {BODY}}}</tool_call>', 1),
    "arguments as text": (
        "hermes",
        f"<tool_call>{json.dumps({'name': 'add', 'arguments': json.dumps(ARGUMENTS)})}</tool_call>",
        1,
    ),
    "Qwen3-Coder": ("hermes", f"<tool_call>\n{CODER}\n</tool_call>", 1),
    "GLM": ("hermes", f"<tool_call>{GLM}</tool_call>", 1),
    "Llama 3": ("llama3", PARAMETERS, 1),
    "Llama 3, tagged": ("llama3", f"<|python_tag|>{PARAMETERS}", 1),
    "Llama 3, two": ("llama3", f"{PARAMETERS}; {PARAMETERS}", 2),
    "Mistral, a list": ("mistral", f"[TOOL_CALLS] [{BODY}, {BODY}]", 2),
    "Mistral, names": ("mistral", f"So: {NAMED}{NAMED}", 2),
    "Mistral, with ids": (
        "mistral",
        NAMED.replace("[ARGS]", "[CALL_ID]abcDEF123[ARGS]"),
        1,
    ),
    "Mistral, [ARGS] skipped": ("mistral", NAMED.replace("[ARGS]", ""), 1),
    "gpt-oss": (
        "harmony",
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant"
        f"{HARMONY}{json.dumps(ARGUMENTS)}<|call|>",
        1,
    ),
    "gpt-oss, to first": (
        "harmony",
        f" to=functions.add<|channel|>commentary json<|message|>{json.dumps(ARGUMENTS)}",
        1,
    ),
    "JSON": ("json", f"\n{BODY}\n", 1),
    "JSON, a list": ("json", f"[{BODY}, {BODY}]", 2),
    "JSON, fenced": ("json", f"```json\n{BODY}\n```", 1),
}


@pytest.mark.parametrize(("name", "text", "count"), WRITTEN.values(), ids=WRITTEN)
def test_a_call_in_the_format_of_a_family_is_run(name: str, text: str, count: int) -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0, tool_call_format=name)
    results, _, done = tools.step(text)
    assert [message["content"] for message in results] == ["3"] * count and not done


ANSWERS = {
    "hermes": ["3", "<tool_call>" * 3, "</tool_call><tool_call>", BODY],
    "llama3": ["3", '{"answer": 3}', '{"arguments": [], "answer": 3}', "[1, 2]", f"So {BODY}"],
    "mistral": ["3", BODY, "[ARGS]{}"],
    "harmony": ["3", "<|channel|>final<|message|>3", "<|channel|>analysis to=<|message", HARMONY],
    "json": ["3", '{"name": "Bob", "age": 3}', "{", "[]", "```\n3\n```", f"So {BODY}"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in ANSWERS.items() for text in texts]
)
def test_a_turn_without_a_call_is_the_answer(name: str, text: str) -> None:
    read: list[str] = []

    def reward(answer: str, row: Any) -> float:
        read.append(answer)
        return 0.5

    tools = sdp.ToolEnvironment([add], reward, tool_call_format=name)
    if name == "harmony" and text == HARMONY:  # a message without an end, to the function
        (result,), _, _ = tools.step(text)
        assert "'a', which is missing" in result["content"] and not read
        return
    assert tools.step(text) == ("", 0.5, True) and read == [text]


ILL = {
    "Hermes, no JSON": ("hermes", "<tool_call>add(1, 2)</tool_call>", "is no JSON of a name"),
    "a key twice": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1, "a": 2, "b": 3}}</tool_call>',
        "a key is there twice",
    ),
    "NaN": ("json", BODY.replace("1", "NaN"), "NaN is no number of JSON"),
    "infinity": ("json", BODY.replace("1", "-Infinity"), "-Infinity is no number of JSON"),
    "a number too large": ("json", BODY.replace("1", "1e999"), "'1e999' is too large a number"),
    "Qwen3-Coder, a parameter twice": (
        "hermes",
        "<tool_call><function=add><parameter=a>1</parameter><parameter=a>2</parameter></tool_call>",
        "an argument of 'add' is there twice",
    ),
    "Qwen3-Coder, cut off": ("hermes", "<tool_call><function=add</tool_call>", "'a', which is mis"),
    "Qwen3-Coder, no number": (
        "hermes",
        f"<tool_call>{CODER.replace('2', 'two')}</tool_call>",
        "'b' must be of type integer, and is 'two'",
    ),
    "GLM, a key without a value": (
        "hermes",
        "<tool_call>add<arg_key>a</arg_key></tool_call>",
        "1 keys and 0 values",
    ),
    "GLM, no such tool": ("hermes", "<tool_call>sub</tool_call>", r"there is no 'sub' with"),
    "Llama 3, cut off": ("llama3", PARAMETERS[:-3], "is no JSON of a name and arguments"),
    "Llama 3, Python": ("llama3", "<|python_tag|>add.call(a=1)", "is no JSON of a name"),
    "Llama 3, no name": ("llama3", '<|python_tag|>{"parameters": {}}', "is no JSON of a name"),
    "Llama 3, too deep": ("llama3", PARAMETERS.replace("1", "[" * 10**5), "RecursionError"),
    "Mistral, cut off": ("mistral", "[TOOL_CALLS]add[ARGS]{", "the arguments of 'add' are no JSON"),
    "Mistral, more than a call": ("mistral", f"{NAMED} and so on", "'add' are no JSON"),
    "Mistral, no list": ("mistral", "[TOOL_CALLS] [add]", "is no JSON of a name"),
    "Mistral, nothing": ("mistral", "[TOOL_CALLS]", "there is no '' with such arguments"),
    "Mistral, an empty list": ("mistral", "[TOOL_CALLS] []", "is no JSON of a name"),
    "Mistral, a number": ("mistral", "[TOOL_CALLS]add[ARGS]3", "no 'add' with such arguments"),
    "gpt-oss, no JSON": ("harmony", f"{HARMONY}1 + 2<|call|>", "arguments of 'add' are no JSON"),
    "gpt-oss, a tool of its own": (
        "harmony",
        "<|channel|>analysis to=python<|message|>1 + 2<|call|>",
        "arguments of 'python' are no JSON",
    ),
    "JSON, a name that is a number": (
        "json",
        '{"name": 3, "arguments": {}}',
        "the name must be a text; it is int",
    ),
}


@pytest.mark.fault("corrupted data", "completion")
@pytest.mark.parametrize(("name", "text", "told"), ILL.values(), ids=ILL)
def test_a_call_that_is_ill_written_is_told_to_the_policy(name: str, text: str, told: str) -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 1.0, tool_call_format=name)
    (result,), reward, done = tools.step(text)
    assert result["content"].startswith("error: ") and told in result["content"]
    assert len(result["content"]) < 500 and (reward, done) == (0.0, False)


PIECES = (
    *("[TOOL_CALLS]", "[ARGS]{", "[TOOL_CALLS]f[ARGS]{'", '[TOOL_CALLS] [{"name": "'),
    *("<|message|>", "to=functions.f<|message|>{", "<|python_tag|>", '<|python_tag|>{"a":'),
    *('{"name": "f", "arguments": ', "<arg_key>", "<function=f><parameter=a>", '{"a":1};'),
)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_in_linear_work(name: str) -> None:
    for piece in PIECES:
        for text in (piece * 500, f"<tool_call>{piece * 500}</tool_call>"):
            count = Count()
            with counting(count, tool_calls):
                FORMATS[name].read(CountedText(text, count))
            assert count.total <= 4_000 + 60 * len(text), f"{piece}: {count.total} of {len(text)}"


@pytest.mark.fault("corrupted data", "completion")
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_policy_writes_is_an_answer_or_short_messages(name: str) -> None:
    chance = random.Random(name)
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0, tool_call_format=name)
    calls = [text for format_name, text, _ in WRITTEN.values() if format_name == name]
    for _ in range(200):
        text = "".join(chance.choices([*PIECES, *HOSTILE, *calls], k=chance.randrange(1, 30)))
        observation, reward, done = tools.step(text)
        assert done is (observation == "") and reward == 0.0
        assert all(len(message["content"]) <= 2000 for message in observation)


def test_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of \['hermes', .*got 'xml'"):
        sdp.ToolEnvironment([add], lambda answer, row: 0.0, tool_call_format="xml")
