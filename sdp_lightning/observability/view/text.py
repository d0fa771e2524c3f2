"""Text of tokens that is safe to show: characters split over tokens, invisible or harmful ones."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoders write it for incomplete characters
PART = "\u00b7"  # shown for a token that is only the beginning of a character
MOST_PARTS = 4  # a character has at most 4 bytes in UTF-8, and a token has at least one
LONGEST = 160  # characters of one token to show
_OPAQUE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # invisible, unassigned, or reordering others
_DRAWN = {"\n": "\u23ce\n", "\t": "\u21e5\t", "\r": "\u240d"}


class Decoder(Protocol):
    """A tokenizer that decodes."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of ``token_ids``."""
        ...


def token_texts(token_ids: Sequence[int], tokenizer: Decoder | None) -> list[str]:
    """Text of every token, through :func:`visible`; joined they are the whole text.

    A character whose bytes lie in several tokens is shown at the last of them, the others as
    :data:`PART`. A token without text, or any token without a tokenizer, is shown as its id.
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
    r"""``text`` with invisible characters named, cut after ``longest`` characters.

    >>> visible("red\x1b[0m\u202e")
    'red␛[0m⟨U+202E⟩'
    """
    cut = text if len(text) <= longest else f"{text[:longest]}\u2026"
    shown = "".join(_visible_character(c) for c in cut)
    if len(text) > longest:
        shown += f"\u27e8{len(text)} characters\u27e9"
    if shown and unicodedata.combining(shown[0]):
        shown = "\u25cc" + shown  # else it would combine with the text before it
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
