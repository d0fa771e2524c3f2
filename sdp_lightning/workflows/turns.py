"""The tokens between two turns: never those that were sampled, which stay as they are.

With a chat template they are found by rendering a conversation that has a mark in the assistant's
place: what follows the mark ends that turn, holds the new messages, and opens the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.workflows.base import Tokenizer
from sdp_lightning.workflows.rlvr import is_conversation

PLACE = "{observation}"
_MARK = "c95bd1b5e8"  # no white space: templates strip it


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
        tokenizer: of the policy.
        turn_format: text with ``{observation}`` in it; None is the tokenizer's chat template.
        stopped_by: the stop token with which the sampled turn ended: it is not written again.

    Raises:
        RolloutError: if the observation is neither text nor messages.
        ConfigError: if the chat template leaves out what an assistant said before.
    """
    messages = as_messages(observation)
    if turn_format is not None:
        said = "\n".join(message["content"] for message in messages)
        text = turn_format.replace(PLACE, said)
        return tokenizer.encode(text, add_special_tokens=False) if text else []
    text = between_turns(tokenizer, messages)
    if stopped_by is not None:
        text = text.removeprefix(tokenizer.decode([stopped_by], skip_special_tokens=False))
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def between_turns(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """What the chat template writes after an assistant's words, up to the assistant's next ones."""
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _MARK},
        *(dict(message) for message in messages),
    ]
    rendered = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    _, mark, after = rendered.partition(_MARK)
    if not mark:
        raise ConfigError(
            "the tokenizer's chat template does not show what an assistant said in an earlier "
            "turn, so there is no telling what stands between turns. Set turn_format, such as "
            f"'\\nuser: {PLACE}\\nassistant: '."
        )
    return after


def as_messages(observation: Any) -> list[Mapping[str, str]]:
    """An observation as messages. Raises ``RolloutError`` if it is none."""
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    found: list[Any] = [observation] if isinstance(observation, Mapping) else observation
    if not is_conversation(found) or not all("content" in message for message in found):
        raise RolloutError(
            f"the observation {observation!r} is neither text nor a list of {{'role', 'content'}} "
            "messages."
        )
    return list(found)
