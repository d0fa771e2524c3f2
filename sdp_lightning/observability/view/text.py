"""Tokens to text that can be shown: split characters, invisible ones, and ones that do harm."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no whole character
PART = "\u00b7"  # stands for a token that is only the beginning of a character
MOST_PARTS = 4  # bytes of a character in UTF-8, and a token has at least one
LONGEST = 160  # characters of one token that are shown
_OPAQUE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # invisible, unassigned, or reordering others
_DRAWN = {"\n": "\u23ce\n", "\t": "\u21e5\t", "\r": "\u240d"}


class Decoder(Protocol):
    """The part of a tokenizer that makes tokens readable."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """The text of ``token_ids``."""
        ...


def token_texts(token_ids: Sequence[int], tokenizer: Decoder | None) -> list[str]:
    """The text of every token, as :func:`visible` shows it; together they are the whole text.

    A character whose bytes lie in several tokens is at the last of them; those before are
    :data:`PART`. A token of no text, or of no tokenizer, is its id.
    """
    if tokenizer is None:
        return [str(token) for token in token_ids]
    texts: list[str] = []
    waiting = 0  # tokens before this one that are beginnings of a character
    for end in range(1, len(token_ids) + 1):
        start = max(0, end - 1 - waiting - 1)  # with a token before: some decoders trim the first
        new = _decode(tokenizer, token_ids[start:end])
        old = _decode(tokenizer, token_ids[start : end - 1 - waiting])
        own = new[len(old) :] if new.startswith(old) else _decode(tokenizer, [token_ids[end - 1]])
        if own.endswith(REPLACEMENT) and waiting + 1 < MOST_PARTS and end < len(token_ids):
            waiting += 1
            texts.append(PART)
            continue
        waiting = 0
        texts.append(visible(own) or f"\u27e8{token_ids[end - 1]}\u27e9")
    return texts


def visible(text: str, longest: int = LONGEST) -> str:
    r"""``text`` with nothing hidden in it: what cannot be seen is named, what is long is cut.

    >>> visible("red\x1b[0m\u202e")
    'red␛[0m⟨U+202E⟩'
    """
    cut = text if len(text) <= longest else f"{text[:longest]}\u2026"
    shown = "".join(_visible_character(c) for c in cut)
    if len(text) > longest:
        shown += f"\u27e8{len(text)} characters\u27e9"
    if shown and unicodedata.combining(shown[0]):
        shown = "\u25cc" + shown  # else it would sit on what stands before it
    return shown


def _visible_character(character: str) -> str:
    if character in _DRAWN:
        return _DRAWN[character]
    if unicodedata.category(character) not in _OPAQUE:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def _decode(tokenizer: Decoder, token_ids: Sequence[int]) -> str:
    if not token_ids:
        return ""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False)
