"""What a chat template writes of a conversation, so that nothing which was said is lost.

A conversation is arranged in one way after another until its text has all that was said. Before a
text is made, marks stand for the contents: what a template does with a role is known for certain,
also of contents as short as ``4``. What was found is remembered for conversations of the same kind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.workflows.chat.arrangement import Arrangement, arrange, arrangements
from sdp_lightning.workflows.chat.messages import SPEAKERS, Message, calls_of, is_open
from sdp_lightning.workflows.chat.rendering import REFUSES, RefusedError, Renderer, Tools
from sdp_lightning.workflows.chat.shown import what_is_lost, written_as_python
from sdp_lightning.workflows.chat.tokens import common_beginning
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

_MARK = "c95bd1b5e8"  # no white space: templates strip it
_EARLIER = "e13b9a5d70"  # contents of messages of which only the roles matter
_MOST_KINDS = 1000
_ALWAYS = {"role", "content"}
# What is said once of an arrangement; the others change the form alone.
_SAID = {
    "system_first": "takes one system message at the head: later ones are joined with it",
    "tools_in_system": "does not describe the tools: the system message does",
    "system_as_user": "does not show the system: its message is the beginning of the user's next",
    "calls_as_text": "does not show calls of tools: they are written as text",
    "results_as_user": "does not show what answers the assistant in another role than the user's, "
    "such as 'tool': it is written as the user's",
}
_End = Literal["here", "before", "never"]


@dataclass(frozen=True)
class _Place:
    """Where messages are to stand.

    Attributes:
        before: messages of which only the roles matter; the last one is the assistant's turn.
        calls: whether that turn is known by its calls, and else by a mark.
        tools: given to the template.
        is_shown: whether the tools must be seen in the text.
    """

    before: tuple[Message, ...] = ()
    calls: bool = False
    tools: Tools = ()
    is_shown: bool = False


@dataclass(frozen=True)
class Between:
    """What a template writes from the end of the assistant's words to its next words.

    Attributes:
        text: all of it.
        header: its part before the first content.
        end: how the assistant's turn ends: ``"here"`` is in the text, ``"before"`` is before it,
            but for white space, and ``"never"``: what is said is within that turn.
    """

    text: str
    header: str
    end: _End = "here"


class ChatTemplate:
    """The chat template of a tokenizer with certain arguments, and what is known of it.

    Args:
        arguments: further arguments of the template, such as ``enable_thinking``.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._renderer = Renderer(arguments)
        self._found: dict[Any, tuple[Arrangement, int]] = {}
        self._probed: dict[Any, tuple[str, _End]] = {}
        self._said: set[str] = set()
        self._shows_turns = False

    def opening(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()) -> str:
        """The text of a prompt; what the assistant is to say next begins at its end.

        Raises:
            RolloutError: if no arrangement of it shows all that is said.
        """
        if not messages:
            raise RolloutError("the prompt is a list without messages.")
        places = [_Place(tools=tools, is_shown=bool(tools))]
        return self._write(messages, places, tokenizer, "prompt").text

    def between(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        history: Sequence[Message] = (),
        tools: Tools = (),
    ) -> Between:
        """What stands between the assistant's turn and its next one.

        Args:
            messages: answer to the turn. A first one of the assistant with calls is that turn.
            tokenizer: tokenizer of the policy.
            history: messages before the turn.
            tools: that were described in the opening.

        Raises:
            RolloutError: if no arrangement of it shows all that is said.
            ConfigError: if the template leaves out what an assistant said before.
        """
        turn: Message = {"role": "assistant", "content": _MARK}
        self._require_turns(tokenizer, turn)
        calls: list[Any] = []
        if messages and "tool_calls" in messages[0] and messages[0]["role"] == "assistant":
            calls, messages = messages[0]["tool_calls"], messages[1:]
        results = [m for m in messages if m["role"] not in SPEAKERS]
        if not calls and results and all("name" in m for m in results):
            functions = [{"name": m["name"], "arguments": {}} for m in results]
            calls = [{"type": "function", "function": f} for f in functions]
        contexts = [[{"role": "user", "content": _EARLIER}]]
        if history:
            contexts.insert(
                0, [{**m, "content": _EARLIER if m["content"] else ""} for m in history]
            )
        called: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        places = [
            _Place((*context, called if by_calls else turn), by_calls, shown)
            for by_calls in ((False, True) if calls and results else (False,))
            for context in contexts
            for shown in (((), tools) if tools else ((),))
        ]
        return self._write(messages, places, tokenizer, "observation")

    def closing(self, tokenizer: Tokenizer) -> str:
        """What ends the assistant's last turn, if nothing follows it."""
        turn = [{"role": "user", "content": _EARLIER}, {"role": "assistant", "content": _MARK}]
        return self._renderer.render(turn, tokenizer, prompt=False).rpartition(_MARK)[2]

    def _require_turns(self, tokenizer: Tokenizer, turn: Message) -> None:
        if self._shows_turns:
            return
        conversation = [
            {"role": "user", "content": _EARLIER},
            turn,
            {"role": "user", "content": "!"},
        ]
        for how in (Arrangement(), Arrangement(parts=True)):
            try:
                text = self._renderer.render(arrange(conversation, how, ()), tokenizer, prompt=True)
            except RefusedError:
                continue
            if _MARK in text:
                self._shows_turns = True
                return
        raise ConfigError(
            "the tokenizer's chat template does not show what an assistant said in an earlier "
            "turn, so there is no telling what stands between turns. Set turn_format, such as "
            "'\\nuser: {observation}\\nassistant: '."
        )

    def _write(
        self,
        messages: Sequence[Message],
        places: Sequence[_Place],
        tokenizer: Tokenizer,
        what: str,
    ) -> Between:
        is_continued = bool(messages) and is_open(messages[-1])
        kind = (what, is_continued, bool(places[-1].tools), len(places), _kind(messages))
        ways = [
            (how, number)
            for how in arrangements(messages, places[0].tools, is_continued=is_continued)
            for number in range(len(places))
        ]
        fault = ""
        for how, number in (*filter(None, (self._found.get(kind),)), *ways):
            try:
                found = self._try(messages, places[number], how, tokenizer, is_continued)
            except RefusedError as error:
                fault = fault or str(error)
                continue
            if len(self._found) < _MOST_KINDS:
                self._found[kind] = how, number
            self._say(how)
            return found
        raise self._error(messages, fault, tokenizer, what)

    def _try(
        self,
        messages: Sequence[Message],
        place: _Place,
        how: Arrangement,
        tokenizer: Tokenizer,
        is_continued: bool,
    ) -> Between:
        """What the template writes if all of ``messages`` is in it. ``RefusedError`` if not."""
        tools = place.tools if place.is_shown else ()
        key = (how, bool(place.tools), place.calls, _kind(place.before), _kind(messages))
        if key not in self._probed:
            marked = [
                {**m, "content": f"m{n}x{_MARK[::-1]}" if m["content"] else ""}
                for n, m in enumerate(messages)
            ]
            text, end = self._text(marked, place, how, tokenizer, is_continued)
            if lost := what_is_lost(marked, tools, text, is_continued=is_continued):
                raise RefusedError(f"leaves out {lost}")
            if len(self._probed) >= _MOST_KINDS:
                self._probed.clear()
            first = next((m["content"] for m in marked if m["content"]), None)
            self._probed[key] = (text if first is None else text.partition(first)[0]), end
        text, _ = self._text(messages, place, how, tokenizer, is_continued)
        trimmed: list[str] = []
        if lost := what_is_lost(messages, tools, text, is_continued=is_continued, trimmed=trimmed):
            raise RefusedError(f"leaves out {lost}")
        if trimmed and "thought" not in self._said:
            self._said.add("thought")
            logger.warning("the chat template leaves out %s, as those of earlier turns", trimmed[0])
        return Between(text, *self._probed[key])

    def _text(
        self,
        messages: Sequence[Message],
        place: _Place,
        how: Arrangement,
        tokenizer: Tokenizer,
        is_continued: bool,
    ) -> tuple[str, _End]:
        """The whole text, or what follows ``place.before`` in it, and how that ends."""
        said = arrange([*place.before, *messages], how, place.tools)
        tools = () if how.tools_in_system else place.tools
        if is_continued:
            text = self._renderer.render_open(
                said, messages[-1]["content"], how.by_prompt, tools, tokenizer
            )
        else:
            text = self._renderer.render(said, tokenizer, tools=tools, prompt=True)
        if written := written_as_python(said, tools, text):
            raise RefusedError(f"writes what Python shows of a value, {written}")
        if not place.before:
            return text, "here"
        if place.calls:
            before = arrange(place.before, how, place.tools)
            called = self._renderer.render(before, tokenizer, tools=tools, prompt=False)
            start = called.rstrip()
            if text.startswith(start):
                return text[len(start) :], "before"
            start = common_beginning(called, text, tokenizer)
            if any(call["name"] not in start for call in calls_of(place.before[-1])):
                raise RefusedError("writes calls otherwise once they are answered")
            return text[len(start) :], "never"
        _, mark, after = text.rpartition(_MARK)
        if not mark:
            raise RefusedError("leaves out what the assistant said")
        if _EARLIER in after:
            raise RefusedError("writes earlier messages again")
        return after, "here"

    def _say(self, how: Arrangement) -> None:
        for change in how.changes:
            if change in _SAID and change not in self._said:
                self._said.add(change)
                logger.warning("the chat template %s", _SAID[change])

    def _error(
        self, messages: Sequence[Message], fault: str, tokenizer: Tokenizer, what: str
    ) -> RolloutError:
        # foreign: a transformers tokenizer
        if getattr(tokenizer, "chat_template", "") is None:
            return RolloutError(
                "the tokenizer cannot write a chat: it has no chat template. Use a model with a "
                "chat template (an instruct or chat model), give the module ModelSource(..., "
                "chat_template=...), or use prompts that are text, with use_chat_template=False."
            )
        if fault.startswith(REFUSES):
            fault = f"refuses {self._refused(messages, tokenizer)}{fault.removeprefix(REFUSES)}"
        # foreign: a transformers tokenizer
        name = getattr(tokenizer, "name_or_path", "")
        return RolloutError(
            f"the chat template{f' of {name!r}' if name else ''} {fault}, however the messages are "
            f"arranged, so the policy would not read the {what} that was written. Change that "
            "message, or use a template that takes it: ModelSource(..., chat_template=...)."
        )

    def _refused(self, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
        """The name of the first message with which the template raises."""
        for index, message in enumerate(messages):
            try:
                self._renderer.render(messages[: index + 1], tokenizer)
            except RefusedError:
                return f"message {index} ({message['role']})"
        return "the messages"


def _kind(messages: Sequence[Message]) -> tuple[Any, ...]:
    """What matters of messages for their arrangement: roles, keys, and which contents are empty."""
    return tuple((m["role"], bool(m["content"]), *sorted(set(m) - _ALWAYS)) for m in messages)
