"""Encodes prompts, and the context between two turns; sampled tokens are never encoded again.

With a chat template, the context is what the template writes between the assistant's words and its
next words: it ends that turn, holds the new messages, and opens the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.timeouts import call_aside_if_long
from sdp_lightning.types import IntArray, Row
from sdp_lightning.workflows.chat.arrangement import describe_tools
from sdp_lightning.workflows.chat.messages import Message, as_messages, encodable, shown
from sdp_lightning.workflows.chat.rendering import Tools
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat.template import Between, ChatTemplate
from sdp_lightning.workflows.chat.tokens import encode_after, is_special
from sdp_lightning.workflows.workflow import Tokenizer

PLACEHOLDER = "{observation}"
_DEFAULTS = ChatSettings()


async def encode_aside(text: Any, encode: Callable[[], list[int]]) -> IntArray:
    """``[n]`` the tokens that ``encode`` gives; in another thread if ``text`` is long.

    Args:
        text: the text, messages or other values that ``encode`` works on.
        encode: one of the functions below, with its arguments.
    """
    return await call_aside_if_long(
        "tokenizing a long text", text, lambda: np.array(encode(), dtype=np.int64)
    )


def outline(said: Any, *, follows_turn: bool = False) -> list[Message]:
    """The messages of a prompt or an observation without their contents: ``history`` of a turn.

    Args:
        said: text, one message, or a list of messages.
        follows_turn: whether the assistant's turn, which it answers, comes first.
    """
    messages = [{**m, "content": "?" if m["content"] else ""} for m in as_messages(said)]
    is_turn = bool(messages) and messages[0]["role"] == "assistant" and "tool_calls" in messages[0]
    turn: list[Message] = [{"role": "assistant", "content": "?"}]
    return [*(turn if follows_turn and not is_turn else []), *messages]


def encode_turn(
    observation: Any,
    tokenizer: Tokenizer,
    *,
    turn_format: str | None,
    stopped_by: int | None,
    sampled: Sequence[int] = (),
    history: Sequence[Message] = (),
    tools: Tools = (),
    settings: ChatSettings = _DEFAULTS,
) -> list[int]:
    """The context between a sampled turn and the next one.

    Args:
        observation: text, one message, or a list of messages; text is a message of the user. A
            first message of the assistant with ``tool_calls`` is the sampled turn, read.
        tokenizer: tokenizer of the policy.
        turn_format: text with ``{observation}`` in it; None is the tokenizer's chat template.
        stopped_by: stop token that ended the sampled turn; it is not written again.
        sampled: the tokens of that turn, or its last ones; the context is encoded as it follows
            them.
        history: messages before that turn, by :func:`outline`: only the roles matter.
        tools: JSON schemas of the tools that were described in the opening.
        settings: how turns are written.

    Raises:
        RolloutError: if the observation is neither text nor messages, or the chat template shows
            not all of it.
        ConfigError: if the chat template leaves out what an assistant said before.
    """
    messages = as_messages(observation)
    before = list(sampled) or [token for token in (stopped_by,) if token is not None]
    if turn_format is not None:
        contents = "\n".join(message["content"] for message in messages)
        text = turn_format.replace(PLACEHOLDER, contents)
        return encode_after(before, text, tokenizer)
    template = settings.template(tokenizer)
    between = template.between(messages, tokenizer, history, tools)
    text = _unwritten(between, template, tokenizer, stopped_by, settings.stop)
    return encode_after(before, text, tokenizer)


def _unwritten(
    between: Between,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    stopped_by: int | None,
    stop: Sequence[str],
) -> str:
    """The part of ``between`` that is left to write once ``stopped_by`` was sampled.

    A model may end its turn with another token than its template does (gpt-oss: ``<|return|>`` for
    ``<|end|>``). What was sampled stays, in place of the template's.
    """
    sampled = tokenizer.decode(
        [token for token in (stopped_by,) if token is not None], skip_special_tokens=False
    )
    ends = stopped_by is not None and is_special(stopped_by, tokenizer)
    if ends and sampled in between.header:
        return between.text[between.text.index(sampled) + len(sampled) :]
    if between.end == "before" and not ends:
        plain = template.between(as_messages("?"), tokenizer)
        return plain.text[: _length_of_end(plain, template, tokenizer)] + between.text
    if not ends or sampled in stop or between.end != "here":
        return between.text.removeprefix(sampled)
    return between.text[_length_of_end(between, template, tokenizer) :]


def _length_of_end(between: Between, template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """Number of characters that end the assistant's turn: through its last special token.

    That is the last one which the end of a last turn, with nothing after it, has in common with it;
    the first if they have none in common; and 0 if that end has no special token.
    """
    ends = encode_after((), template.closing(tokenizer), tokenizer)
    if not any(is_special(token, tokenizer) for token in ends):
        return 0
    length = place = 0
    for index, token in enumerate(encode_after((), between.header, tokenizer)):
        is_common = token in ends[index : index + 1]
        if is_special(token, tokenizer):
            if length and not is_common:
                break
            text = tokenizer.decode([token], skip_special_tokens=False)
            length = place = between.header.find(text, place) + len(text)
        if not is_common:
            ends = []
            if length:
                break
    return length


def encode_prompt(
    row: Row,
    tokenizer: Tokenizer,
    *,
    key: str,
    use_chat_template: bool,
    settings: ChatSettings = _DEFAULTS,
) -> list[int]:
    """The tokens of a row's prompt. ``RolloutError`` if it has no such key."""
    return encode_opening(
        prompt_of(row, key), tokenizer, use_chat_template=use_chat_template, settings=settings
    )


def prompt_of(row: Row, key: str) -> Any:
    """The prompt of a row. ``RolloutError`` if it has no such key."""
    if key not in row:
        raise RolloutError(f"row has no {key!r}; its keys are {sorted(row)}. Set prompt_key.")
    return row[key]


def encode_opening(
    prompt: Any,
    tokenizer: Tokenizer,
    *,
    use_chat_template: bool,
    tools: Tools = (),
    settings: ChatSettings = _DEFAULTS,
) -> list[int]:
    """The tokens of a prompt; a last message of the assistant is continued.

    Args:
        prompt: text, or a list of messages, which the chat template writes.
        tokenizer: tokenizer of the policy.
        use_chat_template: whether a text is a message of the user.
        tools: JSON schemas of functions that the policy may call. They are described by the chat
            template, or else in the system message.
        settings: how prompts are written.

    Raises:
        RolloutError: if it is neither text nor messages, or the chat template shows not all of it.
        ConfigError: if a setting has no effect on this tokenizer.
    """
    how: Any = {"use_chat_template": use_chat_template, "tools": tools, "settings": settings}
    tokens = tokenizer.encode(opening_text(prompt, tokenizer, **how), add_special_tokens=False)
    if not tokens:
        raise RolloutError(f"the prompt {shown(prompt)} has no tokens.")
    is_chat = use_chat_template or not isinstance(prompt, str)
    front = settings.in_front(tokenizer, is_chat=is_chat)
    return tokens if tokens[: len(front)] == front else [*front, *tokens]


def opening_text(
    prompt: Any,
    tokenizer: Tokenizer,
    *,
    use_chat_template: bool,
    tools: Tools = (),
    settings: ChatSettings = _DEFAULTS,
) -> str:
    """The text of a prompt, without what :func:`encode_opening` writes in front of it.

    Its arguments and errors are those of :func:`encode_opening`.
    """
    messages = as_messages(prompt, "prompt")
    if use_chat_template or not isinstance(prompt, str):
        return encodable(settings.template(tokenizer).opening(messages, tokenizer, tools))
    described = [describe_tools(tools)] if tools else []
    return "\n\n".join([*described, encodable(prompt)])
