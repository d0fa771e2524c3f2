"""Stop texts: the token at which the text of a completion first holds one of some texts.

The text of a completion is what the tokenizer decodes its sampled tokens to, special tokens
included; a text may begin in one token and end in another. Pure but for a cache: no engine, no
threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from sdp_lightning.types import IntArray

UNDECODED = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_MARGIN = 8  # characters before a stop text that a decoded window has too


class Decode(Protocol):
    """``decode`` of a tokenizer."""

    def __call__(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Tokens to text."""
        ...


class StopTexts:
    """Looks for stop texts in the tokens of a completion, one token after the other.

    A token is looked up first: most hold no last character of a stop text, so they complete none.
    Only then the last tokens are decoded, as many as it takes. Where a character is made of several
    tokens, nothing matches before its last one.

    Args:
        texts: none is empty.
        decode: of the policy's tokenizer.
    """

    def __init__(self, texts: Iterable[str], decode: Decode) -> None:
        self.texts = tuple(texts)
        self._decode_any = decode
        self._longest = max(map(len, self.texts))
        self._endings = {text[-1] for text in self.texts}
        self._by_bytes = not all(ending.isascii() for ending in self._endings)
        self._lengths: dict[int, int] = {}  # by token; 0: it completes no text

    def ends(self, tokens: Sequence[int] | IntArray, begin: int, end: int) -> bool:
        """Whether ``tokens[end - 1]`` completes a text in ``tokens[begin:end]``.

        The tokens before it complete none.
        """
        last = int(tokens[end - 1])
        length = self._lengths.get(last)
        if length is None:
            length = self._lengths[last] = self._length_if_ending(last)
        if not length:
            return False
        text = self._tail(tokens, begin, end, self._longest + length)
        return any(stop in text for stop in self.texts)

    def first_end(self, tokens: Sequence[int] | IntArray, start: int = 0) -> int | None:
        """Number of tokens up to and with the first that completes a text; None if none does.

        Args:
            tokens: of a completion.
            start: number of tokens that are known to complete none.
        """
        places = range(start + 1, len(tokens) + 1)
        return next((end for end in places if self.ends(tokens, 0, end)), None)

    def rests(self, tokens: Sequence[int] | IntArray) -> list[str]:
        """Ends of stop texts whose beginnings ``tokens`` end with.

        Where the next token follows without what was before, they are stop texts, too.
        """
        text = self._tail(tokens, 0, len(tokens), self._longest).rstrip(UNDECODED)
        found = {
            stop[size:]: None
            for stop in self.texts
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        }
        return list(found)

    def _length_if_ending(self, token: int) -> int:
        """An upper bound on the token's characters; 0 if it cannot complete a text.

        Decoded twice, as decoders write the first token of a text otherwise than later ones.
        """
        text = self._decode([token, token])
        may_end = any(ending in text for ending in self._endings)
        return len(text) if may_end or (self._by_bytes and UNDECODED in text) else 0

    def _tail(self, tokens: Sequence[int] | IntArray, begin: int, end: int, size: int) -> str:
        """The last ``size`` characters of ``tokens[begin:end]``, or fewer if there are no more.

        A window that begins within a character, or within a run of tokens that are bytes, decodes
        otherwise than the whole; so it grows until its end does not change.
        """
        count, before = size + _MARGIN, ""
        while True:
            start = max(begin, end - count)
            text = self._decode([int(token) for token in tokens[start:end]])
            if start == begin:
                return text[-size:]
            if len(text) >= size + _MARGIN:
                text = text[-size:]
                if UNDECODED not in text or text == before:
                    return text
                before = text
            count *= 2

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._decode_any(tokens, skip_special_tokens=False)
