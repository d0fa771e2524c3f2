"""A completion as its reward is given it: the text, and what else the reward asks for by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from sdp_lightning.types import FinishReason
from sdp_lightning.workflows.chat.messages import as_messages, is_open
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.stops import cut_at_stop
from sdp_lightning.workflows.workflow import Tokenizer


class TextSettings(TypedDict, total=False):
    """Settings of the text that the policy, and that a reward or an environment reads.

    Attributes:
        keep_special_tokens: whether it keeps special tokens, such as ``<think>`` where that is one;
            the token that ended the completion is left out. False.
        include_stop_text: whether it has the stop text that ended the completion, as the sampled
            tokens do; what its last token holds beyond the stop text is left out in any case. True.
        chat_template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        add_special_tokens: whether a prompt begins with BOS. None: plain text does where the
            tokenizer itself writes it, and a chat where its template does.
    """

    keep_special_tokens: bool
    include_stop_text: bool
    chat_template_kwargs: Mapping[str, Any]
    add_special_tokens: bool | None


def check_settings(
    workflow: object, settings: Mapping[str, Any], known: type[TextSettings] = TextSettings
) -> None:
    """Raise ``TypeError`` if there is another setting than those of ``known``."""
    if unknown := set(settings) - set(known.__annotations__):
        raise TypeError(f"{type(workflow).__name__} has no setting {sorted(unknown)}.")


def chat_settings(settings: Mapping[str, Any], stop: Sequence[str]) -> ChatSettings:
    """Those of :class:`TextSettings` that say how prompts and turns are written."""
    return ChatSettings(
        settings.get("chat_template_kwargs") or {}, settings.get("add_special_tokens"), tuple(stop)
    )


def completion_text(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    keep_special_tokens: bool = False,
    include_stop_text: bool = True,
) -> str:
    """The text of sampled tokens, up to the first stop text in it.

    Args:
        token_ids: the tokens.
        tokenizer: tokenizer of the policy.
        stop_token_ids: tokens that end a completion.
        keep_special_tokens: whether special tokens are part of the text; the one that ended the
            completion is not.
        stop_texts: texts that end a completion.
        include_stop_text: whether the stop text is part of the text.
    """
    tokens = list(token_ids)
    is_stopped = bool(tokens) and tokens[-1] in stop_token_ids
    if is_stopped and not tokenizer.decode(tokens[-1:], skip_special_tokens=True):
        del tokens[-1]
    text = cut_at_stop(
        *(tokens, tokenizer, stop_texts),
        keep_special_tokens=keep_special_tokens,
        include_stop_text=include_stop_text,
    )
    if text is None:
        return tokenizer.decode(tokens, skip_special_tokens=not keep_special_tokens)
    return text


@dataclass(frozen=True)
class Completion:
    """One sample and its prompt.

    Args:
        text: the text of the sampled tokens.
        token_ids: the sampled tokens, the one that ended them included.
        finish_reason: ``"stop"``, or ``"length"`` if it was cut off at its budget.
        group_index: number of the sample in its group, from 0.
        prompt: the text that the policy read, special tokens included.
        opening: the row's prompt: a text or messages.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    group_index: int
    prompt: str
    opening: Any

    def ask(self, name: str) -> Any:
        """What a reward is given as its parameter ``name``.

        ``messages`` are those of the prompt (a text is the user's) and the completion's, which
        continues a last one of the assistant.
        """
        if name == "messages":
            said, text = as_messages(self.opening, "prompt"), self.text
            if is_open(said[-1]):
                text = said.pop()["content"] + text
            return [*said, {"role": "assistant", "content": text}]
        return {
            "prompt": self.prompt,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "group_index": self.group_index,
        }[name]
