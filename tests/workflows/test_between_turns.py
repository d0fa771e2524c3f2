"""Token for token: what stands between turns is what the template writes there, tokenized there."""

from __future__ import annotations

from typing import Any

import pytest

from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat.tokens import encode_after
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn, outline
from support.chat_templates import FAMILIES, KINDS, tokenizer_of

SAID = ["ok in 12", "use it", "okay"]
ASKED = ["at once?", " in use!", "and\n\nnow?"]
# These write another text of an earlier turn than the one that is sampled.
REWRITING = {"gpt-oss", "cohere 2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ECHO = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7"}


def opening_messages(family: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": "be in use"}] if FAMILIES[family].has_system else []
    return [*system, {"role": "user", "content": "hi in at"}]


def whole(tokenizer: Any, messages: list[Any]) -> str:
    """What the template writes, by transformers alone."""
    if tokenizer.chat_template == FAMILIES["vision"].template:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REWRITING))
@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "cut off"])
def test_the_tokens_of_a_rollout_are_those_of_the_whole_conversation(
    family: str, kind: str, stops: bool
) -> None:
    """The sampled turns are canonical here, so the whole, written at once, has the same tokens."""
    tokenizer, end = tokenizer_of(family, kind), FAMILIES[family].end
    messages: list[Any] = opening_messages(family)
    tokens = encode_opening(messages, tokenizer, use_chat_template=True)
    assert tokens == tokenizer.encode(whole(tokenizer, messages), add_special_tokens=False)
    history = outline(messages)
    for said, asked in zip(SAID, ASKED, strict=True):
        before = whole(tokenizer, messages)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": asked}]
        text = whole(tokenizer, messages)
        assert text.startswith(before)
        turn = text[len(before) : text.index(end, len(before))]
        sampled = encode_after(tokens, turn + end if stops else turn.rstrip(), tokenizer)
        between = encode_turn(
            *(asked, tokenizer),
            turn_format=None,
            stopped_by=sampled[-1] if stops else None,
            sampled=sampled,
            history=history,
        )
        tokens = [*tokens, *sampled, *between]
        history += outline(asked, follows_turn=True)
        assert tokens == tokenizer.encode(text, add_special_tokens=False)


def after(family: str, sampled: str, observation: Any = "at", **settings: Any) -> str:
    """What is written after ``sampled``, whose last token ended the turn if it is special."""
    tokenizer = tokenizer_of(family)
    tokens = tokenizer.encode(sampled, add_special_tokens=False)
    ended = sampled.endswith((">", *settings.get("stop", ())))
    between = encode_turn(
        *(observation, tokenizer),
        turn_format=None,
        stopped_by=tokens[-1] if ended else None,
        sampled=tokens,
        settings=ChatSettings(**settings),
    )
    return tokenizer.decode(between)


NEXT = {
    "gpt-oss": "<|start|>user<|message|>at<|end|><|start|>assistant",
    "cohere 2": "<|SOT|><|USER|>at<|EOT|><|SOT|><|ASSISTANT|>",
    "gemma 2": "\n<sot>user\nat<eot>\n<sot>model\n",
    "glm 4": "\nat<|assistant|>\n",
    "llama 2": "<s>[INST] at [/INST]",
    "phi 3": "\n<|user|>\nat<|end|>\n<|assistant|>\n",
    "vision": "\nUser: at<eou>\nAssistant:",
}
RESULT_IN_GPT_OSS = '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"7"<|end|>'


@pytest.mark.parametrize(
    ("family", "sampled", "written"),
    [
        pytest.param("gpt-oss", "ok<|return|>", "", id="a last turn's end, which stays"),
        pytest.param("gpt-oss", "ok<|end|>", "", id="an earlier turn's end"),
        pytest.param("gpt-oss", "ok", "<|end|>", id="cut off, and ended as earlier turns are"),
        pytest.param("cohere 2", "<|RESPONSE|>ok<|/RESPONSE|><|EOT|>", "", id="an end of two"),
        pytest.param("cohere 2", "ok<|EOS|>", "", id="another end in place of two"),
        pytest.param("cohere 2", "ok", "<|/RESPONSE|><|EOT|>", id="cut off before an end of two"),
        pytest.param("gemma 2", "ok<eos>", "", id="the end of a text in place of a turn's"),
        pytest.param("phi 3", "ok<|endoftext|>", "", id="the same, of another family"),
        pytest.param("glm 4", "ok<|user|>", "", id="the next speaker, who is written once"),
        pytest.param("glm 4", "ok", "<|user|>", id="the next speaker, who was not sampled"),
        pytest.param("llama 2", "ok</s>", "", id="white space before the end is not sampled"),
        pytest.param("llama 2", "ok", " </s>", id="nor is it lost"),
        pytest.param("vision", "ok</s>", "", id="contents in parts"),
    ],
)
def test_the_end_of_a_turn_is_written_once(family: str, sampled: str, written: str) -> None:
    assert after(family, sampled) == written + NEXT[family]


def test_a_special_token_that_is_a_stop_text_does_not_end_the_message() -> None:
    assert after("gpt-oss", "ok<|call|>", stop=("<|call|>",)) == "<|end|>" + NEXT["gpt-oss"]
    assert after("gpt-oss", "ok<|call|>") == NEXT["gpt-oss"]
    assert after("phi 3", "ok?", stop=("?",)) == "<|end|>" + NEXT["phi 3"]


@pytest.mark.parametrize(
    ("family", "sampled", "observation", "written"),
    [
        ("gpt-oss", "{}<|call|>", [ECHO, RESULT], RESULT_IN_GPT_OSS + "<|start|>assistant"),
        (
            *("gpt-oss", "{}", [{**RESULT, "name": "add"}]),
            "<|end|>" + RESULT_IN_GPT_OSS + "<|start|>assistant",
        ),
        ("gemma 4", "<|call|>call:add{}<call|><|result>", [ECHO, RESULT], "7<result|>"),
        (
            "gemma 4",
            "<|call|>call:add{}<call|>",
            [{**RESULT, "name": "add"}],
            "<|result>7<result|>",
        ),
        ("qwen 2.5", "{}<|im_end|>", [ECHO, RESULT], None),
    ],
    ids=["a call", "cut off", "within the turn", "a result with a name", "a call is no matter"],
)
def test_a_result_follows_the_call_that_it_answers(
    family: str, sampled: str, observation: Any, written: str | None
) -> None:
    """Where a template shows results of calls alone, the sampled turn is a call to it."""
    plain = after(family, sampled, [RESULT]) if written is None else written
    assert after(family, sampled, observation) == plain
    assert "7" in plain


def test_words_that_would_merge_with_the_sampled_ones_stay_apart() -> None:
    """What was sampled stays as sampled, so that a token across the border is not written."""
    for kind in KINDS:
        tokenizer = tokenizer_of("zephyr", kind)
        sampled = tokenizer.encode("us", add_special_tokens=False)
        between = encode_turn(
            "e?", tokenizer, turn_format="{observation}", stopped_by=None, sampled=sampled
        )
        rest = "##e" if kind == "wordpiece" else "e"
        assert tokenizer.convert_ids_to_tokens(between) == [rest, "?"], kind
