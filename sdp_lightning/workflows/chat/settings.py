"""Settings of how prompts and turns are written, and the chat template that they belong to."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from sdp_lightning.errors import ConfigError
from sdp_lightning.workflows.chat.template import ChatTemplate
from sdp_lightning.workflows.chat.tokens import written_in_front
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

# Arguments of apply_chat_template that are no arguments of the template, or are set elsewhere.
_TAKEN = {
    *("conversation", "tools", "chat_template", "add_generation_prompt", "messages"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers
_TEMPLATES: WeakKeyDictionary[Any, dict[str, ChatTemplate]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ChatSettings:
    """How prompts and turns are written.

    Args:
        chat_template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        add_special_tokens: whether a prompt begins with the tokenizer's BOS. None: plain text does
            where the tokenizer itself writes it; a chat has what its template writes. True: every
            prompt, which then has it once. False: plain text does not.
        stop: texts that end a turn without being the end of the assistant's message.

    Raises:
        ConfigError: if an argument is not the template's.
    """

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    add_special_tokens: bool | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kwargs: object = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise ConfigError(f"chat_template_kwargs must be a mapping of names, got {kwargs!r}.")
        if taken := sorted(_TAKEN & set(self.chat_template_kwargs)):
            raise ConfigError(
                f"chat_template_kwargs has {taken}, which the workflow sets itself: leave it out. "
                "A template of your own is ModelSource(..., chat_template=...)."
            )
        if self.add_special_tokens not in (None, True, False):
            raise ConfigError(
                f"add_special_tokens must be True, False or None, got {self.add_special_tokens!r}."
            )

    def template(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The tokenizer's chat template with these arguments, and what is known of it.

        Raises:
            ConfigError: if the template never reads one of the arguments.
        """
        # foreign: a transformers tokenizer
        template: Any = getattr(tokenizer, "chat_template", "")
        known = _TEMPLATES.setdefault(tokenizer, {})
        key = repr((template, sorted(self.chat_template_kwargs.items())))
        if key not in known:
            _refuse_unread(template, self.chat_template_kwargs)
            known[key] = ChatTemplate(self.chat_template_kwargs)
        return known[key]

    def in_front(self, tokenizer: Tokenizer, *, is_chat: bool) -> list[int]:
        """The tokens that a prompt must begin with.

        Raises:
            ConfigError: if BOS is asked for, and the tokenizer has none.
        """
        if not self.add_special_tokens:
            is_left_out = is_chat or self.add_special_tokens is False
            return [] if is_left_out else written_in_front(tokenizer)
        if front := written_in_front(tokenizer):
            return front
        # foreign: a transformers tokenizer
        bos: int | None = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise ConfigError(
                "add_special_tokens=True, and the tokenizer has no token that begins a text (no "
                "bos_token): leave it out."
            )
        return [bos]


def _refuse_unread(template: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if ``template`` reads none of the variables named by a key."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    texts = list(template.values()) if isinstance(template, Mapping) else [template]
    if not kwargs or not all(isinstance(text, str) and text for text in texts):
        return
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    read: set[str] = set()
    for text in texts:
        try:
            parsed = environment.parse(_GENERATION.sub("", text))
        except TemplateSyntaxError:
            return  # rendering says so
        read |= meta.find_undeclared_variables(parsed)
    if unread := sorted(set(kwargs) - read):
        known = sorted(read - _TAKEN - {"raise_exception", "strftime_now", "documents"})
        raise ConfigError(
            f"chat_template_kwargs has {unread}, which the chat template never reads; it reads "
            f"{known}. Correct the name, or leave it out."
        )
