"""What a chat template writes of a conversation, so that nothing which was said is lost.

A conversation is arranged in one way after another until its text has all that was said. Before a
text is made, marks stand for the contents: what a template does with a role is known for certain,
also of contents as short as ``4``. What was found is remembered for conversations of the same kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.workflows.chat.arrangement import Arrangement, arrange, arrangements
from sdp_lightning.workflows.chat.marks import EARLIER, MARK, kind_of_messages, marked, others_of
from sdp_lightning.workflows.chat.messages import (
    SPEAKERS,
    Message,
    as_json,
    calls_of,
    is_open,
)
from sdp_lightning.workflows.chat.notes import Notes
from sdp_lightning.workflows.chat.rendering import REFUSES, RefusedError, Renderer, Tools
from sdp_lightning.workflows.chat.shown import what_is_lost, written_as_python
from sdp_lightning.workflows.chat.tokens import common_beginning
from sdp_lightning.workflows.workflow import Tokenizer

_MOST_PROBES = 10_000
_End = Literal["here", "before", "never"]


@dataclass(frozen=True)
class _Place:
    """A place where messages are to stand.

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


_Way = tuple[Arrangement, _Place, Tokenizer, bool]
_Probed = tuple[str, _End]


class ChatTemplate:
    """The chat template of a tokenizer with certain arguments, and what is known of it.

    Args:
        arguments: further arguments of the template, such as ``enable_thinking``.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._renderer = Renderer(arguments)
        self._first: dict[Any, int] = {}  # way of each kind that marks come through
        self._probed: dict[Any, _Probed | str] = {}
        self._notes = Notes()
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
        turn: Message = {"role": "assistant", "content": MARK}
        self._require_turns(tokenizer, turn)
        calls: list[Any] = []
        if messages and "tool_calls" in messages[0] and messages[0]["role"] == "assistant":
            calls, messages = messages[0]["tool_calls"], messages[1:]
        results = [m for m in messages if m["role"] not in SPEAKERS]
        if not calls and results and all("name" in m for m in results):
            functions = [{"name": m["name"], "arguments": {}} for m in results]
            calls = [{"type": "function", "function": f} for f in functions]
        contexts = [[{"role": "user", "content": EARLIER}]]
        history = [
            message
            for message, following in itertools.zip_longest(history, history[1:], fillvalue=turn)
            if not (is_open(message) and following["role"] == "assistant")  # it was continued
        ]
        if history:
            contexts.insert(0, [{**m, "content": EARLIER if m["content"] else ""} for m in history])
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
        turn = [{"role": "user", "content": EARLIER}, {"role": "assistant", "content": MARK}]
        return self._renderer.render(turn, tokenizer, prompt=False).rpartition(MARK)[2]

    def _require_turns(self, tokenizer: Tokenizer, turn: Message) -> None:
        if self._shows_turns:
            return
        conversation = [
            {"role": "user", "content": EARLIER},
            turn,
            {"role": "user", "content": "!"},
        ]
        for how in (Arrangement(), Arrangement(parts=True)):
            try:
                text = self._renderer.render(arrange(conversation, how, ()), tokenizer, prompt=True)
            except RefusedError:
                continue
            if MARK in text:
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
        hows = arrangements(messages, places[0].tools, is_continued=is_continued)
        tools = as_json(places[-1].tools) if places[-1].tools else ""
        kind = (
            what,
            tools,
            kind_of_messages(messages),
            *(kind_of_messages(place.before) for place in places),
        )
        for number in range(self._first.get(kind, 0), len(hows) * len(places)):
            way = hows[number // len(places)], places[number % len(places)], tokenizer, is_continued
            try:
                probed = self._probe((kind, number), messages, *way)
                self._first.setdefault(kind, number)
                text = self._complete(messages, *way)
            except RefusedError:
                continue
            self._notes.say(way[0].changes)
            return Between(text, *probed)
        raise self._error(messages, places[0], tokenizer, what)

    def _probe(self, key: Any, messages: Sequence[Message], *way: *_Way) -> _Probed:
        """What the template writes before the first mark that stands for a content, and its end.

        Raises:
            RefusedError: if a mark is left out.
        """
        if key not in self._probed:
            if len(self._probed) >= _MOST_PROBES:
                self._probed.clear()
                self._first.clear()
            probes = marked(messages)
            first = next((m["content"] for m in probes if m["content"]), None)
            try:
                text, end = self._text(probes, *way)
                _require_all(probes, way, text)
                self._require_speakers(probes, way, text)
                self._probed[key] = (text if first is None else text.partition(first)[0]), end
            except RefusedError as error:
                self._probed[key] = str(error)
        probed = self._probed[key]
        if isinstance(probed, str):
            raise RefusedError(probed)
        return probed

    def _require_speakers(self, probes: Sequence[Message], way: _Way, text: str) -> None:
        """Raise ``RefusedError`` if ``text`` has what another role says as the assistant's words.

        A template that writes the user's words so, too, tells no roles apart.
        """

        def is_written_as(index: int, role: str) -> bool:
            try:
                return self._text(probes, *way, spoken=(index, role))[0] == text
            except RefusedError:
                return False

        for index, role in others_of(
            probes, arrange([*way[1].before, *probes], way[0], way[1].tools)
        ):
            if is_written_as(index, "assistant") and not is_written_as(index, "user"):
                raise RefusedError(f"writes what the role {role!r} says as the assistant's words")

    def _complete(self, messages: Sequence[Message], *way: *_Way) -> str:
        """What the template writes of all ``messages``. ``RefusedError`` if something is lost."""
        text, _ = self._text(messages, *way)
        if trimmed := _require_all(messages, way, text):
            self._notes.say(("thoughts",), trimmed[0])
        return text

    def _text(
        self,
        messages: Sequence[Message],
        how: Arrangement,
        place: _Place,
        tokenizer: Tokenizer,
        is_continued: bool,
        *,
        spoken: tuple[int, str] | None = None,
    ) -> tuple[str, _End]:
        """The whole text, or what follows ``place.before`` in it, and how that ends.

        ``spoken`` gives one of the messages, as they are arranged, another role.
        """
        said = arrange([*place.before, *messages], how, place.tools)
        if spoken is not None:
            said[spoken[0]] |= {"role": spoken[1]}
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
        _, mark, after = text.rpartition(MARK)
        if not mark:
            raise RefusedError("leaves out what the assistant said")
        if EARLIER in after:
            raise RefusedError("writes earlier messages again")
        return after, "here"

    def _error(
        self, messages: Sequence[Message], place: _Place, tokenizer: Tokenizer, what: str
    ) -> RolloutError:
        """The error of the arrangement that changes nothing."""
        # foreign: a transformers tokenizer
        if getattr(tokenizer, "chat_template", "") is None:
            return RolloutError(
                "the tokenizer cannot write a chat: it has no chat template. Use a model with a "
                "chat template (an instruct or chat model), give the module ModelSource(..., "
                "chat_template=...), or use prompts that are text, with use_chat_template=False."
            )
        way = Arrangement(), place, tokenizer, bool(messages) and is_open(messages[-1])
        fault = ""
        for said in (marked(messages), messages):
            try:
                text = self._complete(said, *way)
                self._require_speakers(said, way, text)
            except RefusedError as error:
                fault = str(error)
                break
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


def _require_all(messages: Sequence[Message], way: _Way, text: str) -> list[str]:
    """What ``text`` leaves out of ``messages`` that it may. ``RefusedError`` if it must not."""
    _, place, _, is_continued = way
    tools, trimmed = place.tools if place.is_shown else (), list[str]()
    if lost := what_is_lost(messages, tools, text, is_continued=is_continued, trimmed=trimmed):
        raise RefusedError(f"leaves out {lost}")
    return trimmed
