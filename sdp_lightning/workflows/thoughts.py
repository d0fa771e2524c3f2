"""What a turn says aloud: without what the policy thought, such as ``<think>...</think>``.

A call of a tool within a thought is none: the model families' own parsers do not read it, either.
"""

from __future__ import annotations

import re

_OPENING = re.compile(
    r"<(?:\w{1,20}:)?(?:think(?:ing)?|thought)>|\[THINK\]|◁think▷|<\|START_THINKING\|>"
)
_CLOSING = re.compile(
    r"</(?:\w{1,20}:)?(?:think(?:ing)?|thought)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
)
_END_OF_CALL = {"<tool_call>": "</tool_call>"}


def without_thoughts(text: str, before: str = "", call: str = "") -> str:
    """``text`` without its thoughts; one that is not closed goes on to the end.

    Calls stay as they are, also where an argument has such marks in it.

    >>> without_thoughts("<think>f(1)?</think>f(2)"), without_thoughts("f(1)?</think>f(2)")
    ('f(2)', 'f(2)')

    Args:
        text: a turn.
        before: the text before it, which may end with the beginning of a thought.
        call: how a call begins; empty: as JSON, at the beginning of what is said.
    """
    kept: list[str] = []
    place, is_open = 0, _ends_open(before) or _begins_open(text, call)
    while (mark := (_CLOSING if is_open else _OPENING).search(text, place)) is not None:
        if not is_open:
            said = text[place : mark.start()]
            if _is_in_call(said, call, is_first=not "".join(kept[-1:]).strip()):
                end = text.find(_END_OF_CALL.get(call, "\0"), mark.end())
                if end < 0:
                    break
                kept.append(text[place:end])
                place = end
                continue
            kept.append(said)
        place, is_open = mark.end(), not is_open
    return "".join(kept) if is_open else "".join([*kept, text[place:]])


def _ends_open(before: str) -> bool:
    stripped = before.rstrip()
    marks = list(_OPENING.finditer(stripped, max(len(stripped) - 30, 0)))
    return bool(marks) and marks[-1].end() == len(stripped)


def _begins_open(text: str, call: str) -> bool:
    """Whether a thought ends in ``text`` that did not begin there."""
    opening, closing = _OPENING.search(text), _CLOSING.search(text)
    if closing is None or (opening is not None and opening.start() < closing.start()):
        return False
    return not _is_in_call(text[: closing.start()], call, is_first=True)


def _is_in_call(said: str, call: str, *, is_first: bool) -> bool:
    """Whether ``said`` has the beginning of a call, and not its end."""
    if not call:
        return is_first and said.lstrip()[:1] in ("{", "[", "`")
    place = said.rfind(call)
    return place >= 0 and said.find(_END_OF_CALL.get(call, "\0"), place) < 0
