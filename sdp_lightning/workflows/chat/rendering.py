"""One call of a chat template: the text that it writes of messages, or why it writes none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.workflows.chat.messages import Message
from sdp_lightning.workflows.workflow import Tokenizer

Tools = Sequence[Mapping[str, Any]]
REFUSES = "refuses it"
_END = "d06ce2c6f9"  # stands where a message is to be continued
_OPENING_TAG = re.compile(r"\s*(<[^<>/\s]+>|\[[^\[\]/\s]+\])")


class RefusedError(Exception):
    """The template raised, or leaves out what is needed; its text completes "the template"."""


class Renderer:
    """Calls the chat template of a tokenizer.

    Args:
        arguments: further arguments of the template.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        *,
        tools: Tools = (),
        prompt: bool = False,
    ) -> str:
        """The text of ``messages``; with ``prompt``, what the assistant says next follows it.

        Raises:
            RefusedError: whatever the template raises.
        """
        from jinja2 import TemplateError

        given = {**self._arguments, **({"tools": list(tools)} if tools else {})}
        try:
            return tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=prompt, tokenize=False, **given
            )
        except (
            *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
            ArithmeticError,
        ) as error:  # what templates raise, of their own and of Python's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RefusedError(f"{REFUSES}: {reason}") from error

    def render_open(
        self,
        said: list[Message],
        content: str,
        by_prompt: bool,
        tools: Tools,
        tokenizer: Tokenizer,
    ) -> str:
        """The text of messages the last of which is open at its end.

        Args:
            said: the messages as they are given to the template.
            content: what is to be continued.
            by_prompt: whether the last message follows the generation prompt; else the template
                writes it, which may put something before it.
            tools: given to the template.
            tokenizer: whose template it is.

        Raises:
            RefusedError: if the template raises, or leaves out the end of the last message.
        """
        tag = _OPENING_TAG.match(content)
        if by_prompt:
            text = self.render(said[:-1], tokenizer, tools=tools, prompt=True)
            if text == self.render(said[:-1], tokenizer, tools=tools, prompt=False):
                raise RefusedError("has no generation prompt that could be continued")
            if tag and text.rstrip().endswith(tag[1]):  # it begins the assistant's thoughts itself
                return text + content[tag.end() :].lstrip("\n")
            return text + content
        last: Any = said[-1]["content"]
        ends: Any = f"{last}{_END}"
        if isinstance(last, list):
            ends = [{"type": "text", "text": f"{last[0]['text']}{_END}"}]
        text = self.render([*said[:-1], {**said[-1], "content": ends}], tokenizer, tools=tools)
        text, mark, _ = text.rpartition(_END)
        if not mark:
            raise RefusedError("leaves out the end of the message that is to be continued")
        if tag:
            before = self.render(said[:-1], tokenizer, tools=tools)
            if text.count(tag[1]) > before.count(tag[1]) + content.count(tag[1]):
                raise RefusedError(f"writes {tag[1]} before a message that begins with it")
        return text
