"""Nothing that was said is lost: in every family's text, or an error names the message."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows.chat.messages import as_messages
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn
from support.chat_templates import FAMILIES, tokenizer_of
from support.rollouts import CodePoints

SUM: dict[str, Any] = {
    "name": "add",
    "description": 'The "sum" of two.',
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": SUM}]
CALL = {"id": "x", "function": {"name": "add", "arguments": '{"a": 17, "s": "q\\"r"}'}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "image_url": None}


# Prompts, and what their text has in order; what a system says may stand elsewhere.
PROMPTS: dict[str, tuple[list[dict[str, Any]], list[str], list[str]]] = {
    "parts": ([user([part("Q"), part("1?")])], ["Q1?"], []),
    "keys that are None": ([user("Q1?", tool_calls=None, name=None)], ["Q1?"], []),
    "two systems": ([system("S1"), system("S2"), user("Q1")], ["Q1"], ["S1", "S2"]),
    "a late system": (
        [system("S1"), user("Q1"), said("A1"), system("S2"), user("Q2")],
        ["Q1", "A1", "Q2"],
        ["S1", "S2"],
    ),
    "a developer": ([{"role": "developer", "content": "S1"}, user("Q1")], ["Q1"], ["S1"]),
    "two users": ([user("Q1"), user("Q2")], ["Q1", "Q2"], []),
    "a call": (
        [user("Q1"), said(None, tool_calls=[CALL]), {"role": "tool", "content": "7"}],
        ["Q1", "add", "17", "7"],
        ['q\\"r'],
    ),
    "a result of another role": (
        [user("Q1"), said("A1"), {"role": "function", "content": {"b": 1}}],
        ["Q1", "A1", '"b'],
        [],
    ),
    "white space": ([user("  Q1\n\n\n  Q2  ")], ["Q1", "Q2"], []),
    "numpy": ([user(np.array([part("Q1")], dtype=object))], ["Q1"], []),
}


def opening(messages: Any, family: str, **settings: Any) -> str:
    template = ChatSettings(**settings).template(tokenizer := tokenizer_of(family))
    return template.opening(as_messages(messages, "prompt"), tokenizer)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_that_a_prompt_says_is_in_the_text_of_every_family(prompt: str) -> None:
    messages, in_order, anywhere = PROMPTS[prompt]
    for family in FAMILIES:
        text = opening(messages, family)
        pattern = ".*".join(map(re.escape, in_order))
        assert re.search(pattern, text.replace('\\"b', '"b'), re.DOTALL), f"{family}: {text}"
        assert all(word in text for word in anywhere), f"{family}: {text}"
        assert not re.search(r"None|\{'|\['", text), f"{family}: {text}"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observation_is_read_in_every_family(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for role in ("tool", "ipython", "user", "system"):
        observation = [{"role": role, "content": "4"}, {"role": role, "content": "No. 5\n\n6"}]
        tokens = encode_turn(observation, tokenizer, turn_format=None, stopped_by=None)
        assert re.search(r"4.*No\. 5.*6", tokenizer.decode(tokens), re.DOTALL), role


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_described_once_and_the_rows_own_rules_stay(family: str) -> None:
    tokenizer = tokenizer_of(family)
    messages = [system("RULES"), user("1+1?")]
    tokens = encode_opening(messages, tokenizer, use_chat_template=True, tools=TOOLS)
    text = tokenizer.decode(tokens)
    assert text.count('The \\"sum\\" of two.') == 1 and '"add"' in text
    assert "RULES" in text and "1+1?" in text
    by_template = "tools" in FAMILIES[family].template
    assert ("You may call these functions" in text) is not by_template
    if "raise_exception" not in FAMILIES[family].template and FAMILIES[family].has_system:
        assert text.index("The \\") < text.index("1+1?"), "in the system message"


def test_tools_precede_a_plain_text() -> None:
    tokens = encode_opening("1+1=", CodePoints(), use_chat_template=False, tools=TOOLS)
    text = CodePoints().decode(tokens)
    assert '"add"' in text and text.endswith("\n\n1+1=")


# What is left out may be thoughts, and is said ----------------------------------------------------


def test_thoughts_of_earlier_turns_may_be_left_out_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thought = [user("Q1"), said("<think>\nT1\n</think>\n\nA1"), user("Q2")]
    settings = {"chat_template_kwargs": {"enable_thinking": True}}  # a template not used elsewhere
    with caplog.at_level(logging.WARNING):
        texts = [opening(thought, "qwen 3", **settings) for _ in range(2)]
    assert "T1" not in texts[0] and "A1" in texts[0] and texts[0] == texts[1]
    assert caplog.text.count("leaves out what the assistant thought in message 1") == 1
    assert "T1" in opening(thought, "llama 3")


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_what_others_say_is_never_taken_for_a_thought(role: str) -> None:
    cuts = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = cuts
    messages = [user("q1"), said("a1"), {"role": role, "content": "<think>t1</think>a2"}]
    with pytest.raises(RolloutError, match=rf"leaves out message 2 \({role}\)"):
        encode_opening(messages, tokenizer, use_chat_template=True)


USER_AND_ELSE = (
    "{% for m in messages %}{{ 'u:' if m.role == 'user' else 'a:' }}{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_what_others_say_is_never_written_as_the_assistants_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = USER_AND_ELSE
    template = ChatSettings().template(tokenizer)
    prompt = as_messages([system("s1"), user("q1"), said("a1"), system("s2"), user("q2")])
    assert template.opening(prompt, tokenizer) == "u:s1\n\nq1.a:a1.u:s2\n\nq2.a:"
    result = as_messages({"role": "tool", "content": "7"})
    assert template.between(result, tokenizer).text == ".u:7.a:"
    critic = as_messages([user("q1"), {"role": "critic", "content": "c1"}])
    with pytest.raises(RolloutError, match="writes what the role 'critic' says as the assistant's"):
        template.opening(critic, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    plain = ChatSettings().template(tokenizer).opening(critic, tokenizer)
    assert plain == "q1.c1.", "a template that tells no roles apart"
    late = opening([system("S1"), user("Q1"), system("S2")], "llama 2")
    assert late == "<s>[INST] <<SYS>>\nS1\n\nS2\n<</SYS>>\n\nQ1 [/INST]"


# Errors name the message --------------------------------------------------------------------------

NO_TOOL = "{% for m in messages if m.role in roles %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        pytest.param(
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            [user("q1"), said("a1"), user("q2")],
            r"the chat template leaves out message 1 \(assistant\), however .* the prompt that was "
            r"written. Change that message, or use .*ModelSource\(\.\.\., chat_template=\.\.\.\)",
            id="left out",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "{{ raise_exception('never\nmind') }}{% endif %}{{ m.content }}{% endfor %}",
            [user("q1"), said("a1"), user("q2")],
            r"refuses message 1 \(assistant\): never mind, however",
            id="refused",
        ),
        pytest.param(
            "{% for m in messages %}{{ 1 + m.content }}{% endfor %}",
            [user("q1")],
            r"refuses message 0 \(user\): unsupported operand",
            id="an error of Python",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
            [user("q" * 9)],
            r"leaves out message 0 \(user\)",
            id="cut",
        ),
        pytest.param(
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            [user("q1"), said("a1"), user("q2")],
            r"leaves out message 1 \(assistant\)",
            id="in another order",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [user("q1"), {"role": "user"}],
            r"message 1 of the prompt, {'role': 'user'}, is neither text nor a list of",
            id="no content",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [user("q1"), user(3)],
            r"message 1 of the prompt \(user\) has the content 3, which is neither",
            id="a number",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [said("", tool_calls=[{"function": {"arguments": {}}}])],
            r"message 0 of the prompt has the tool call .*; it must be {'type': 'function'",
            id="a call without a name",
        ),
        pytest.param("{{ 1 }}", [], "the prompt is a list without messages", id="empty"),
    ],
)
def test_what_cannot_be_shown_is_named_in_one_line(
    template: str, messages: list[Any], error: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RolloutError, match=error) as caught:
        encode_opening(messages, tokenizer, use_chat_template=True)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_shown_as_python_writes_it_is_refused() -> None:
    """Unless what was said looks so itself."""
    tokenizer = tiny_tokenizer()
    shows = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ %s }}{% endif %}"
    tokenizer.chat_template = shows.replace("%s", "m.tool_calls[0].function") + "{% endfor %}"
    call = said("", tool_calls=[{"name": "add", "arguments": {"a": ["b"], "c": True}}])
    text = ChatSettings().template(tokenizer).opening(as_messages([user("q"), call]), tokenizer)
    assert '<tool_call>{"name": "add", "arguments": {"a": ["b"], "c": true}}' in text
    assert encode_opening("{'a': ['b']}", tokenizer, use_chat_template=True)


# Settings -----------------------------------------------------------------------------------------


def test_arguments_of_the_template_reach_prompts_and_turns() -> None:
    quiet = ChatSettings({"enable_thinking": False})
    tokenizer = tokenizer_of("qwen 3")
    prompt = encode_opening([user("Q1")], tokenizer, use_chat_template=True, settings=quiet)
    turn = encode_turn("Q2", tokenizer, turn_format=None, stopped_by=None, settings=quiet)
    for tokens in (prompt, turn):
        assert tokenizer.decode(tokens).endswith("assistant\n<think>\n\n</think>\n\n")
    assert "think" not in opening([user("Q1")], "qwen 3")


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"enable_thinkin": False}, r"\['enable_thinkin'\], which the chat template never reads; "),
        ({"tokenize": True}, r"has \['tokenize'\], which the workflow sets itself"),
        ({"chat_template": "x"}, r"A template of your own is ModelSource"),
        (["enable_thinking"], "must be a mapping of names"),
    ],
    ids=str,
)
def test_arguments_without_effect_are_refused(kwargs: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        opening([user("Q1")], "qwen 3", chat_template_kwargs=kwargs)


def test_arguments_that_a_template_sets_by_default_are_read() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% set level = level | default('low') %}{% generation %}{{ level }}{% endgeneration %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = ChatSettings({"level": "high"}).template(tokenizer)
    assert template.opening([user("q1")], tokenizer) == "highq1"
