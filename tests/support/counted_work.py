"""How much work a parser does on a text, in operations and not in seconds.

Three things are counted, and one is shown from the source:

- characters read by methods of ``str``, also in C: the text is a :class:`CountedText`, whose
  methods and slices add what they read (``find`` only up to its match);
- characters given to ``json.loads``, to JSON decoders and to the patterns of ``re``, which read the
  buffer itself: ``counting`` stands in for all;
- lines of Python that are run, by ``sys.settrace``.

What a pattern does inside of one pass over its text cannot be counted from outside. So a pattern
over completions must be one that is linear by its form: :func:`why_not_linear`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

sre: Any = importlib.import_module("re._constants")
parser: Any = importlib.import_module("re._parser")


class Count:
    """Characters read and lines run."""

    def __init__(self) -> None:
        self.characters = self.lines = 0

    @property
    def total(self) -> int:
        return self.characters + self.lines


class CountedText(str):
    """A text that adds to ``count`` what is read of it."""

    work: Count

    def __new__(cls, text: str, count: Count) -> CountedText:
        self = super().__new__(cls, text)
        self.work = count
        return self

    def __getitem__(self, key: Any) -> Any:
        part = str.__getitem__(self, key)
        self.work.characters += len(part)
        return CountedText(part, self.work)

    def __iter__(self) -> Iterator[str]:
        for character in str.__iter__(self):
            self.work.characters += 1
            yield character


def _searching(name: str) -> Callable[..., int]:
    """``find`` or ``rfind``: reads from its end of the text up to what it finds."""

    def search(self: CountedText, part: str, start: int = 0, end: int | None = None) -> int:
        stop = len(self) if end is None else end
        place: int = getattr(str, name)(self, part, start, stop)
        if place < 0:
            self.work.characters += max(0, stop - start)
        elif name == "find":
            self.work.characters += place + len(part) - start
        else:
            self.work.characters += stop - place
        return place

    return search


def _reading_all(name: str) -> Callable[..., Any]:
    def method(self: CountedText, *args: Any, **kwargs: Any) -> Any:
        self.work.characters += len(self)
        value = getattr(str, name)(self, *args, **kwargs)
        return _counted(value, self.work)

    return method


def _reading_an_end(name: str) -> Callable[..., Any]:
    def method(self: CountedText, part: Any, *args: Any) -> Any:
        self.work.characters += len(part) if isinstance(part, str) else max(map(len, part))
        return _counted(getattr(str, name)(self, part, *args), self.work)

    return method


def _counted(value: Any, count: Count) -> Any:
    if isinstance(value, str):
        return CountedText(value, count)
    if isinstance(value, list | tuple):
        return type(value)(_counted(each, count) for each in value)
    return value


_SEARCHES = ("find", "rfind")
_ENDS = ("startswith", "endswith", "removeprefix", "removesuffix")
_CONSTANT = ("isascii", "format", "format_map", "maketrans", "__len__", "__sizeof__")
_OPERATORS = (
    "__contains__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__gt__",
    "__add__",
    "__mul__",
    "__mod__",
)
for _name in dir(str):
    if _name in _SEARCHES:
        setattr(CountedText, _name, _searching(_name))
    elif _name in _ENDS:
        setattr(CountedText, _name, _reading_an_end(_name))
    elif _name in _OPERATORS or not (_name.startswith("__") or _name in _CONSTANT):
        setattr(CountedText, _name, _reading_all(_name))
CountedText.__hash__ = str.__hash__  # type: ignore[method-assign]


class CountedPattern:
    """A pattern whose every pass adds the text that is left to it."""

    def __init__(self, pattern: re.Pattern[str], count: Count) -> None:
        self._pattern, self._count = pattern, count

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        self._count.characters += len(text)
        return self._pattern.finditer(text)

    def match(self, text: str, place: int = 0) -> re.Match[str] | None:
        found = self._pattern.match(text, place)
        self._count.characters += 1 if found is None else 1 + len(found[0])
        return found


class CountedDecoder:
    """A decoder of JSON that adds what it reads: to the end of the text where it fails."""

    def __init__(self, decoder: json.JSONDecoder, count: Count) -> None:
        self._decoder, self._count = decoder, count

    def decode(self, text: str) -> Any:
        self._count.characters += len(text)
        return self._decoder.decode(text)

    def raw_decode(self, text: str, place: int = 0) -> tuple[Any, int]:
        end = len(text)
        try:
            value, end = self._decoder.raw_decode(text, place)
        finally:
            self._count.characters += end - place
        return value, end


@contextmanager
def counting(count: Count, *modules: Any) -> Iterator[None]:
    """Count lines run, ``json.loads``, and the patterns and JSON decoders of ``modules``."""
    loads = json.loads

    def counted_loads(text: str) -> Any:
        count.characters += len(text)
        return loads(text)

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        count.lines += event == "line"
        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "loads", counted_loads)
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, re.Pattern):
                    patch.setattr(module, name, CountedPattern(value, count))
                if isinstance(value, json.JSONDecoder):
                    patch.setattr(module, name, CountedDecoder(value, count))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


# Patterns -----------------------------------------------------------------------------------------

_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_LOOKS = (sre.ASSERT, sre.ASSERT_NOT)


def why_not_linear(pattern: str, flags: int = 0) -> str:
    """Why ``finditer`` with ``pattern`` may take more than linear time; empty if it cannot.

    The rule: once a repetition without bound has begun, the match succeeds. What follows it is
    optional, in the pattern and in every group around it; it repeats no such repetition, and no
    look-around holds one. Then an attempt that fails has read a bounded number of characters, one
    that succeeds is never undone, and the next attempt begins behind it. ``<a>(.*?)</a>`` breaks
    the rule: without an end every ``<a>`` reads the rest of the text.
    """
    return _walk(parser.parse(pattern, flags), must_follow=False)


def _walk(items: Any, *, must_follow: bool) -> str:
    """Why not, for a sequence behind which something must (or need not) match."""
    for kind, argument in reversed(list(items)):
        if kind in _REPEATS:
            least, most, body = argument
            if most == sre.MAXREPEAT:
                if must_follow:
                    return "something must follow a repetition without bound"
                if _is_unbounded(body):
                    return "a repetition without bound is repeated"
            elif reason := _walk(body, must_follow=must_follow or most > 1):
                return reason
            must_follow = must_follow or least > 0
            continue
        if kind in _LOOKS:
            if _is_unbounded(argument[1]):
                return "a look-around holds a repetition without bound"
        elif kind is sre.SUBPATTERN:
            if reason := _walk(argument[-1], must_follow=must_follow):
                return reason
        elif kind is sre.BRANCH:
            for branch in argument[1]:
                if reason := _walk(branch, must_follow=must_follow):
                    return reason
        elif kind in (sre.GROUPREF, sre.GROUPREF_EXISTS, sre.ATOMIC_GROUP):
            return f"{kind} is not known to this check"
        must_follow = True
    return ""


def _is_unbounded(items: Any) -> bool:
    return items.getwidth()[1] >= sre.MAXREPEAT or "MAXREPEAT" in repr(list(items))
