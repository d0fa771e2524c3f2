"""The format of tool calls that a tokenizer's chat template or response template writes is read."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import closing
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, Segment
from sdp_lightning.workflows.environment import Transcript
from sdp_lightning.workflows.tool_format import FORMATS
from support.rollouts import DEADLINE_S

ARGUMENTS = {"a": 1, "b": 2}
HARMONY = "<|channel|>commentary to=functions.{{ f.name }} <|constrain|>json<|message|>"


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


# Templates ----------------------------------------------------------------------------------------

JSON = '{"name": "{{ f.name }}", "KEY": {{ f.arguments | tojson }}}'
CALLS = {  # as templates of the family write them, in our words
    "Hermes": f"<tool_call>\n{JSON.replace('KEY', 'arguments')}\n</tool_call>",
    "Qwen3-Coder": (
        "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments | items %}"
        "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    ),
    "GLM": (
        "<tool_call>{{ f.name }}\n{% for k, v in f.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>"
    ),
    "Llama 3": JSON.replace("KEY", "parameters"),
    "Mistral": "[TOOL_CALLS] [" + JSON.replace("KEY", "arguments")[:-1] + ', "id": "{{ c.id }}"}]',
    "Mistral 11": "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}",
    "gpt-oss": HARMONY + "{{ f.arguments | tojson }}",
    "Granite": f"<|tool_call|>[{JSON.replace('KEY', 'arguments')}]",
    "Cohere": (
        '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "{{ f.name }}", "parameters": '
        "{{ f.arguments | tojson }}}\n]<|END_ACTION|>"
    ),
    "DeepSeek": (
        "<|calls|><|call_begin|>function<|sep|>{{ f.name }}\n```json\n"
        "{{ '' ~ f.arguments if f.arguments is string else raise_exception('no text') }}\n```"
        "<|call_end|>"
    ),
    "Kimi": (
        "<|calls|><|call_begin|>functions.{{ f.name }}:{{ loop.index0 }}<|sep|>"
        "{{ f.arguments | tojson }}<|call_end|>"
    ),
}
TEMPLATE = """
{%- if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.role == 'assistant' and loop.last and m.content %}<think></think>{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}{% set f = c.function %}CALL{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
MARKS = (
    *("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>"),
    *("[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|constrain|>", "<|message|>", "<|python_tag|>"),
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|START_ACTION|>", "<|END_ACTION|>"),
    *("<|calls|>", "<|call_begin|>", "<|sep|>", "<|call_end|>"),
)


def make_tokenizer(call: str) -> Any:
    """A byte-level tokenizer whose marks are all special, with a template that writes ``call``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = TEMPLATE.replace("CALL", call)
    return tokenizer


def written_by(tokenizer: Any) -> list[int]:
    """The tokens of a turn that calls ``add``, as the tokenizer's template writes it."""
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
        call = {"id": "abcDEF123", "function": {"name": "add", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = tokenizer.apply_chat_template([turn], tokenize=False)
        except Exception:
            continue
        return tokenizer.encode(text.removeprefix("<|assistant|>"), add_special_tokens=False)
    raise AssertionError("the template writes no call")


def begin(tools: sdp.Environment, tokenizer: Any, row: Any = None) -> tuple[Transcript, Any]:
    transcript = Transcript(tokenizer, [tokenizer.eos_token_id])
    tools.begin(transcript)
    return transcript, tools.reset(row or {"prompt": "1+2?"})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_a_chat_template_writes_is_what_is_read(call: str) -> None:
    """Also where all marks are special tokens, which the text of the turn lacks."""
    tokenizer = make_tokenizer(call)
    tools: Any = sdp.ToolEnvironment([add], lambda answer, row: 0.5)
    transcript, prompt = begin(tools, tokenizer)
    assert prompt == [{"role": "user", "content": "1+2?"}], "the template shows the tools"
    [schema] = tools.tools
    assert schema["function"]["name"] == "add"
    ids = written_by(tokenizer)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    transcript.hear(said, ids, ())
    (result,), _, _ = tools.step(said)
    assert (result["content"], result["name"], len(result["tool_call_id"])) == ("3", "add", 9)
    ids = tokenizer.encode("<think>1+2</think>3<|end|>", add_special_tokens=False)
    transcript.hear("1+23", ids, ())
    assert tools.step("1+23") == ("", 0.5, True), "an answer is no call"


def test_a_template_without_calls_or_tools_is_told_how_in_the_one_system_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    example = FORMATS["hermes"].example
    plain = make_tokenizer("")
    plain.chat_template = plain.chat_template.replace("if tools", "if false")
    silent = make_tokenizer(CALLS["Mistral"])
    silent.chat_template = silent.chat_template.replace("if tools", "if false")
    unknown = make_tokenizer("<|calls|><invoke>{{ f.name }}({{ f.arguments.key }})</invoke>")
    row = {"prompt": [{"role": "system", "content": "RULES"}, {"role": "user", "content": "?"}]}
    with caplog.at_level(logging.WARNING):
        for tokenizer, told in (
            (plain, example),
            (silent, FORMATS["mistral"].example),
            (unknown, example),
        ):
            tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0)
            _, (system, user) = begin(tools, tokenizer, row)
            assert system["content"].startswith("RULES\n\n") and told in system["content"]
            assert "add(a: int, b: int) -> int: The sum." in system["content"]
            assert user == row["prompt"][1] and not tools.tools
    [warning] = caplog.messages
    assert "<|calls|><invoke>" in warning and "no tool_call_format reads" in warning


def test_a_template_that_shows_tools_and_no_calls_is_given_them_and_told_how_to_call() -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0)
    _, (system, user) = begin(tools, make_tokenizer(""))
    assert system["content"].startswith(f"To call a function, write {FORMATS['hermes'].example}")
    assert "The sum." not in system["content"] and user["role"] == "user" and tools.tools


def test_a_format_that_the_template_does_not_write_is_described() -> None:
    tools = sdp.ToolEnvironment([add], lambda answer, row: 0.0, tool_call_format="llama3")
    _, (system, _) = begin(tools, make_tokenizer(CALLS["Hermes"]))
    assert FORMATS["llama3"].example in system["content"] and not tools.tools
    _, prompt = begin(tools, make_tokenizer(CALLS["Llama 3"]))
    assert len(prompt) == 1 and tools.tools


def test_a_rollout_reads_calls_whose_marks_are_special_tokens() -> None:
    """Of Mistral; ``[TOOL_CALLS]`` and ``[ARGS]`` were hidden, and the call was the answer."""
    tokenizer = make_tokenizer(CALLS["Mistral 11"])
    turns = [written_by(tokenizer), tokenizer.encode("3<|end|>", add_special_tokens=False)]
    read: list[str] = []

    class Says(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            ids = turns.pop(0)
            sink(Segment(0, ids, [-1.0] * len(ids)))
            return "stop"

    def reward(answer: str, row: Any) -> float:
        read.append(answer)
        return 1.0

    workflow = sdp.MultiTurnWorkflow(lambda: sdp.ToolEnvironment([add], reward), group_size=1)
    engine = Says()
    executor = create_workflow_executor(
        config=sdp.RolloutConfig(batch_size=1, num_epochs=1, timeout_s=DEADLINE_S),
        engine=engine,
        workflow=workflow,
        prompts=[{"id": "r0", "prompt": "1+2?"}],
        tokenizer=tokenizer,
    )
    with closing(executor), closing(engine):
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
    [trajectory] = group.trajectories
    prompt, between = (p.token_ids for p in trajectory.parts if isinstance(p, Context))
    assert '"description": "The sum."' in tokenizer.decode(prompt)
    assert "<|tool|>3<|end|>" in tokenizer.decode(between) and read == ["3"]


# Response templates -------------------------------------------------------------------------------

RESPONSE = {
    "start_anchor": "<|assistant|>",
    "defaults": {"role": "assistant", "tool_calls": []},
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<\|calls\|>call:(?P<name>\w+)",
            "close": "<|call_end|>",
            "content": "json",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {},
    },
}
CALL = '<|calls|>call:add{"a": 1, "b": 2}<|call_end|>'


@pytest.mark.parametrize("is_tokenizers", [True, False], ids=["the tokenizer's", "set"])
def test_a_response_template_of_transformers_is_used(is_tokenizers: bool) -> None:
    """With the text before the turn, which may have begun a thought; a call in it is none."""
    tokenizer, before = make_tokenizer(CALLS["Hermes"]), copy.deepcopy(RESPONSE)
    settings: dict[str, Any] = {} if is_tokenizers else {"tool_call_format": RESPONSE}
    tokenizer.response_template = RESPONSE if is_tokenizers else None
    tools: Any = sdp.ToolEnvironment([add], lambda answer, row: 0.5, **settings)
    transcript, _ = begin(tools, tokenizer)

    def step(turn: str, prompt: str = f"<|assistant|>{CALL}<|end|><|assistant|>") -> Any:
        ids, history = (tokenizer.encode(t, add_special_tokens=False) for t in (turn, prompt))
        said = tokenizer.decode(ids, skip_special_tokens=True)
        transcript.hear(said, ids, history)
        observation, _, done = tools.step(said)
        return done or [message["content"] for message in observation]

    assert step(f"So {CALL}{CALL}") == ["3", "3"]
    assert step("3") is True
    assert step(f"{CALL}</think>3", "<|assistant|><think>") is True
    assert step("3", prompt=CALL) is True, "calls before the turn are not run again"
    [told] = step('<|calls|>call:add{"a": 1<|call_end|>')
    assert told.startswith("error: the call cannot be read (ValueError")
    bad = CALL.replace(": 2", ": two")
    told = step(f"{CALL}{bad}So{CALL}{bad}{CALL}")
    assert [text.partition(" (")[0] for text in told] == [
        *("3", "error: the call cannot be read", "3", "error: the call cannot be read", "3")
    ], "the good ones are run, in their order"
    assert step(f"<think>{CALL}{bad}</think>{CALL}{bad}")[0] == "3"
    [told] = step(bad * 65)
    assert "cannot be read" in told
    assert before == RESPONSE, "nothing is written to it"


def test_a_malformed_response_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="response template for tool calls is malformed: resp"):
        sdp.ToolEnvironment([add], lambda a, r: 0.0, tool_call_format={"fields": {"content": {}}})
    tokenizer = make_tokenizer("")
    tokenizer.response_template = {"version": 7, "fields": {}}
    with pytest.raises(ConfigError, match="malformed: Unsupported response_template version: 7"):
        begin(sdp.ToolEnvironment([add], lambda a, r: 0.0), tokenizer)
