"""Which format of tool calls the policy is told to write, by its chat template, and what reads it.

It is found by effect: the template writes a call of a made-up name, and shows made-up messages.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sdp_lightning.errors import ConfigError
from sdp_lightning.workflows.environment import Transcript, shown
from sdp_lightning.workflows.thoughts import without_thoughts
from sdp_lightning.workflows.tool_calls import (
    CallReader,
    ToolCall,
    call_of,
    read_bare,
    read_harmony,
    read_marked,
    read_mistral,
    read_tagged,
)

logger = logging.getLogger(__name__)

_MOST_PIECES = 64  # of a turn that is read call by call
_NAME, _VALUE, _SAID = "c95bd1b5e8", "d17e0a93b4", "e20f8c6a75"


class CallFormat(NamedTuple):
    """How calls are written.

    Attributes:
        read: finds them in a turn.
        example: a call, for a policy that is not told by its chat template.
        is_templates: whether the chat template writes calls so, too; None: it writes none.
        reads_thoughts: whether ``read`` knows a thought from a call.
    """

    read: CallReader
    example: str
    is_templates: bool | None = False
    reads_thoughts: bool = False

    def calls(self, turn: str, before: str) -> list[ToolCall]:
        """The calls of a turn, but for those in its thoughts; ``before`` is the text before it."""
        if self.reads_thoughts:
            return self.read(turn)
        said = without_thoughts(turn, before, self.example.partition("{")[0].partition("name")[0])
        calls = self.read(said)
        if not calls and said != turn and self.read(turn):
            _say_thought()
        return calls


FORMATS = {
    "hermes": CallFormat(read_tagged, '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'),
    "llama3": CallFormat(read_bare, '{"name": ..., "parameters": {...}}'),
    "mistral": CallFormat(read_mistral, "[TOOL_CALLS]name[ARGS]{...}"),
    "harmony": CallFormat(
        read_harmony, "<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}"
    ),
    "json": CallFormat(read_bare, '{"name": ..., "arguments": {...}}'),
}


@functools.cache
def _say_thought() -> None:
    logger.warning("a call of a tool within a thought (<think>) is not run; this is said once")


def check_format(tool_call_format: object) -> None:
    """Raise ``ConfigError`` if there is no such format, or a response template is malformed."""
    if isinstance(tool_call_format, Mapping):
        _check_template(tool_call_format)
    elif tool_call_format not in ("auto", *FORMATS):
        raise ConfigError(
            f"tool_call_format must be 'auto', one of {list(FORMATS)}, or a response template of "
            f"transformers; got {tool_call_format!r}."
        )


def find_format(
    tool_call_format: str | Mapping[str, Any],
    transcript: Transcript | None,
    tools: Sequence[Mapping[str, Any]],
) -> CallFormat:
    """What reads the calls of a turn.

    Args:
        tool_call_format: a name, a response template, or ``"auto"``: the tokenizer's response
            template, else what its chat template writes, else that of Hermes.
        transcript: tokenizer and tokens of the rollout, if they are known.
        tools: schemas of the tools.

    Raises:
        ConfigError: if the tokenizer's response template is malformed.
    """
    wanted: Any = tool_call_format
    if transcript is not None and wanted == "auto":
        # foreign: a tokenizer need not be one of transformers'
        wanted = getattr(transcript.tokenizer, "response_template", None) or "auto"
    written = FORMATS["hermes"]
    if transcript is not None:
        template = _template_of(transcript.tokenizer)
        written = _written_by(transcript.tokenizer, template, must_be_read=wanted == "auto")
    if not isinstance(wanted, str):
        _check_template(wanted)
        read = functools.partial(_read_by_template, transcript, wanted, tools)
        return CallFormat(read, written.example, is_templates=True, reads_thoughts=True)
    named = FORMATS.get(wanted, written)
    same = wanted == "auto" or written.read == named.read
    fits = written.is_templates if same or written.is_templates is None else False
    return (written if same else named)._replace(is_templates=fits)


def shows_tools(
    tokenizer: Any, tools: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the chat template, given ``tools``, shows them and all of such ``messages``."""
    roles = tuple(str(message.get("role")) for message in messages)
    return _shows(tokenizer, _template_of(tokenizer), json.dumps(tools), roles)


def _template_of(tokenizer: Any) -> str:
    # foreign: a tokenizer need not be one of transformers'
    return str(getattr(tokenizer, "chat_template", None))


@functools.lru_cache(maxsize=64)
def _shows(tokenizer: Any, chat_template: str, tools: str, roles: tuple[str, ...]) -> bool:
    messages = [{"role": role, "content": f"{_SAID}{n}."} for n, role in enumerate(roles)]
    text = _squeezed(_render(tokenizer, messages, tools=json.loads(tools)))
    said = [message["content"] for message in messages]
    functions = [tool.get("function", tool) for tool in json.loads(tools)]
    said += [function[key] for function in functions for key in ("name", "description")]
    return all(
        any(_squeezed(form) in text for form in (part, json.dumps(part)[1:-1])) for part in said
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


# Response templates -------------------------------------------------------------------------------


def _check_template(template: Any) -> None:
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        load_response_template(dict(template))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the response template for tool calls is malformed: {error}") from error


def _read_by_template(
    transcript: Transcript | None, template: Any, tools: Sequence[Mapping[str, Any]], text: str
) -> list[ToolCall]:
    """The calls that transformers finds in a turn by a response template.

    It raises for the whole turn if one of them cannot be read. Then the turn is read from call to
    call, without those.
    """
    from transformers.utils.chat_parsing import parse_response
    from transformers.utils.chat_parsing.response_templates import load_response_template

    own = load_response_template(copy.deepcopy(dict(template)))  # whose defaults are written to
    prefix = "" if transcript is None else transcript.before()
    if not own.start_anchor_re.search(prefix):  # or the calls of earlier turns were this one's
        prefix = ""

    def read(said: str) -> list[ToolCall]:
        fresh = load_response_template(copy.deepcopy(dict(template)))
        found = parse_response(said, fresh, prefix=prefix, tools=[dict(tool) for tool in tools])
        return [call_of(call) for call in _flat(found.get("tool_calls", []))]

    try:
        return read(text)
    except Exception as error:  # of the template's patterns and parsers, over what was written
        field = own.fields.get("tool_calls")
        begins = None if field is None else field.open_re
        places = [] if begins is None else [found.start() for found in begins.finditer(text)]
        if not 1 < len(places) <= _MOST_PIECES:
            return [_unreadable(error)]
        ends = [*places[1:], len(text)]
        return _read_pieces(
            read, text[: places[0]], map(text.__getitem__, map(slice, places, ends))
        )


def _read_pieces(read: CallReader, said: str, pieces: Iterable[str]) -> list[ToolCall]:
    """The calls of ``pieces`` that follow ``said``, each of which may begin one; with errors."""
    num_good, calls = 0, list[ToolCall]()
    for piece in pieces:
        try:
            found = read(said + piece)
        except Exception as error:
            calls.append(_unreadable(error))
            continue
        said += piece
        calls += found[num_good:]
        num_good = len(found)
    return calls


def _unreadable(error: Exception) -> ToolCall:
    return ToolCall(error=f"the call cannot be read ({shown(error)})")


def _flat(calls: Any) -> list[Any]:
    return [each for call in calls for each in _flat(call)] if isinstance(calls, list) else [calls]


# Chat templates -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _written_by(tokenizer: Any, chat_template: str, *, must_be_read: bool) -> CallFormat:
    """The format that the chat template writes; that of Hermes where that is not to be found."""
    words, text = _written_call(tokenizer)
    marks = {f"to=functions.{_NAME}": "harmony", "[TOOL_CALLS]": "mistral", "<tool_call>": "hermes"}
    name = next((name for mark, name in marks.items() if mark in text), "")
    if name:
        return FORMATS[name]._replace(is_templates=True)
    if not text:
        return FORMATS["hermes"]._replace(is_templates=None)
    before, _, after = text.partition(_NAME)
    place = _find_json(text, _NAME)
    if place is not None:
        bare = FORMATS["llama3" if '"parameters"' in text else "json"]
        mark = _last_mark(text[:place], words)
        read = functools.partial(read_bare, mark=mark)
        whole = CallFormat(read, mark + bare.example) if mark else bare
        return whole._replace(is_templates=True)
    place, mark = _find_json(after, _VALUE), _last_mark(before, words)
    if place is not None and mark:
        separator = _last_mark(after[:place])
        read = functools.partial(read_marked, mark=mark, separator=separator)
        return CallFormat(read, f"{mark}name{separator}{{...}}", is_templates=True)
    if must_be_read:
        logger.warning(
            "the chat template writes a tool call as %s, which no tool_call_format reads: the "
            "policy is asked for %s instead. A response template of transformers could read it.",
            *(shown(text), FORMATS["hermes"].example),
        )
    return FORMATS["hermes"]


def _written_call(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes in an assistant's turn: before words, and of a call.

    The call is empty if the template does not show it.
    """
    plain = _render_turn(tokenizer, {"content": _SAID})
    for arguments in ({"key": _VALUE}, json.dumps({"key": _VALUE})):
        function = {"name": _NAME, "arguments": arguments}
        call = {"type": "function", "id": _NAME[:9], "function": function}
        text = _render_turn(tokenizer, {"content": "", "tool_calls": [call]})
        pairs = zip(plain, text, strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        for opening, closing in ("<>", "[]"):  # not in the midst of a mark
            place = text.rfind(opening, 0, start)
            start = place if place > text.rfind(closing, 0, start) else start
        if _NAME in text[start:]:
            return plain[start:].partition(_SAID)[0], text[start:]
    return "", ""


def _render_turn(tokenizer: Any, turn: Mapping[str, Any]) -> str:
    """A conversation with one turn of the assistant, answered if the template wants that."""
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "?"}}}
    function = {"name": _NAME, "description": "?", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", **turn}]
    result = {"role": "tool", "content": "?", "name": _NAME, "tool_call_id": _NAME[:9]}
    texts = (_render(tokenizer, [*asked, *rest], tools=tools) for rest in ([], [result]))
    return next(filter(None, texts), "")


def _render(tokenizer: Any, messages: Sequence[Any], *, tools: Any) -> str:
    """The conversation by the chat template; empty if it raises."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return ""


def _find_json(text: str, word: str) -> int | None:
    """The place of the first JSON object or list that has ``word`` in it."""
    for place, character in enumerate(text):
        if character in "{[":
            try:
                value, _ = json.JSONDecoder().raw_decode(text, place)
            except ValueError:
                continue
            if word in json.dumps(value):
                return place
    return None


def _last_mark(before: str, words: str = "") -> str:
    """The last tag in ``before``, or all of it; empty if it also stands before words."""
    stripped = before.strip()
    mark = stripped[max(stripped.rfind("<"), 0) :]
    return "" if mark in words else mark
