"""Encodes prompts, and the context between two turns; sampled tokens are never encoded again.

With a chat template, the context is the text after a mark in a rendered conversation whose mark
stands for the assistant's words: it ends that turn, holds the new messages, and opens the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards.timeouts import call_aside_if_long
from sdp_lightning.types import IntArray, Row, SamplingParams
from sdp_lightning.workflows.workflow import Tokenizer

PLACEHOLDER = "{observation}"
_LONGEST_SHOWN = 200  # characters of a prompt or an observation in an error
_MARK = "c95bd1b5e8"  # no white space: templates strip it


async def encode_aside(text: Any, encode: Callable[[], list[int]]) -> IntArray:
    """``[n]`` the tokens that ``encode`` gives; in another thread if ``text`` is long.

    Args:
        text: the text, messages or other values that ``encode`` works on.
        encode: one of the functions below, with its arguments.
    """
    return await call_aside_if_long(
        "tokenizing a long text", text, lambda: np.array(encode(), dtype=np.int64)
    )


def encode_turn(
    observation: Any,
    tokenizer: Tokenizer,
    *,
    turn_format: str | None,
    stopped_by: int | None,
) -> list[int]:
    """The context between a sampled turn and the next one.

    Args:
        observation: text, one message, or a list of messages; text is a message of the user.
        tokenizer: tokenizer of the policy.
        turn_format: text with ``{observation}`` in it; None is the tokenizer's chat template.
        stopped_by: stop token that ended the sampled turn; it is not written again.

    Raises:
        RolloutError: if the observation is neither text nor messages.
        ConfigError: if the chat template leaves out what an assistant said before.
    """
    messages = as_messages(observation)
    if turn_format is not None:
        contents = "\n".join(map(_text_of, messages))
        text = turn_format.replace(PLACEHOLDER, contents)
    else:
        text = between_turns(tokenizer, messages)
        if stopped_by is not None:
            text = text.removeprefix(tokenizer.decode([stopped_by], skip_special_tokens=False))
    return tokenizer.encode(encodable(text), add_special_tokens=False) if text else []


def encodable(text: str) -> str:
    r"""``text`` with U+FFFD for each lone surrogate, which tokenizers refuse.

    JSON may hold one (``"\\ud800"``), so an environment that repeats its call may, too.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def between_turns(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of the chat template between an assistant's words and its next words."""
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _MARK},
        *(dict(message) for message in messages),
    ]
    _, mark, after = _write(conversation, tokenizer).partition(_MARK)
    if not mark:
        raise ConfigError(
            "the tokenizer's chat template does not show what an assistant said in an earlier "
            "turn, so there is no telling what stands between turns. Set turn_format, such as "
            f"'\\nuser: {PLACEHOLDER}\\nassistant: '."
        )
    return after


def as_messages(observation: Any) -> list[Mapping[str, str]]:
    """The messages of an observation. ``RolloutError`` if it is neither text nor messages."""
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    messages: list[Any] = [observation] if isinstance(observation, Mapping) else observation
    if not is_conversation(messages) or not all("content" in message for message in messages):
        raise RolloutError(
            f"the observation {_shown(observation)} is neither text nor a list of "
            "{'role', 'content'} messages."
        )
    _require_text(messages)
    return list(messages)


def encode_prompt(
    row: Row, tokenizer: Tokenizer, *, key: str, use_chat_template: bool
) -> list[int]:
    """The tokens of a row's prompt. ``RolloutError`` if it has no such key."""
    return encode_opening(prompt_of(row, key), tokenizer, use_chat_template=use_chat_template)


def prompt_of(row: Row, key: str) -> Any:
    """The prompt of a row. ``RolloutError`` if it has no such key."""
    if key not in row:
        raise RolloutError(f"row has no {key!r}; its keys are {sorted(row)}. Set prompt_key.")
    return row[key]


def encode_opening(prompt: Any, tokenizer: Tokenizer, *, use_chat_template: bool) -> list[int]:
    """The tokens of a prompt. ``RolloutError`` if it is neither text nor messages."""
    text = opening_text(prompt, tokenizer, use_chat_template=use_chat_template)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise RolloutError(f"the prompt {_shown(prompt)} has no tokens.")
    return tokens


def opening_text(prompt: Any, tokenizer: Tokenizer, *, use_chat_template: bool) -> str:
    """The text of a prompt. ``RolloutError`` if it is neither text nor messages."""
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise RolloutError(
            f"the prompt {_shown(prompt)} is neither text nor a list of "
            "{'role', 'content'} messages."
        )
    if not isinstance(prompt, str):
        _require_text(prompt)
    if isinstance(prompt, str) and not use_chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _render(messages, tokenizer)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _render(messages: Any, tokenizer: Tokenizer) -> str:
    try:
        return _write(messages, tokenizer)
    except ValueError as error:  # what transformers raises where there is no template
        raise RolloutError(
            f"the tokenizer cannot write a chat: {error} Use a model with a chat template "
            "(an instruct or chat model), give the module ModelSource(..., chat_template=...), or "
            "use prompts that are text, with use_chat_template=False."
        ) from error


def _write(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """The conversation by the chat template.

    Templates of vision-language models may write nothing of a content that is a text, and expect
    ``[{"type": "text", "text": ...}]``: what leaves texts out is written again with that.
    """
    from jinja2 import TemplateError

    rendered = _apply(messages, tokenizer)
    texts = [m["content"].strip() for m in messages if isinstance(m.get("content"), str)]
    num_written = sum(text in rendered for text in texts)
    if num_written == len(texts):
        return rendered
    in_parts = [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]
    try:
        other = _apply(in_parts, tokenizer)
    except (TemplateError, TypeError, ValueError):  # the template wants texts
        return rendered
    return other if sum(text in other for text in texts) > num_written else rendered


def _apply(messages: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _require_text(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a message that has more than text in it.

    Raises:
        RolloutError: naming the kind of the part.
    """
    for message in messages:
        content: Any = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and "text" in part and part.get("type", "text") == "text":
                continue
            kind = type(part).__name__
            if isinstance(part, Mapping):
                kind = part.get("type", ", ".join(map(str, part)))
            raise RolloutError(
                f"the {message.get('role')}'s message has a part of type {kind!r}, and models are "
                "trained on text only. Leave it out, or say in words what it shows."
            )


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content is a text or parts of one."""
    content: Any = message["content"]
    if isinstance(content, (list, tuple)):
        return "".join(part["text"] for part in content)
    return content


def is_conversation(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of messages."""
    return isinstance(prompt, (list, tuple)) and all(isinstance(m, Mapping) for m in prompt)


def with_stops(params: SamplingParams, tokenizer: Tokenizer, stop: Sequence[str]) -> SamplingParams:
    """Sampling settings that also stop at the end of text and at the texts of ``stop``.

    Raises:
        ConfigError: if a text is not exactly one token.
    """
    stops = dict.fromkeys(params.stop_token_ids)
    if tokenizer.eos_token_id is not None:
        stops[tokenizer.eos_token_id] = None
    for text in stop:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(
                f"stop text {text!r} is {len(tokens)} tokens for this tokenizer; only texts of "
                "one token can stop a completion."
            )
        stops[tokens[0]] = None
    return replace(params, stop_token_ids=tuple(stops))
