"""Tokens of a text where it stands, and those that a tokenizer itself puts around a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from sdp_lightning.workflows.chat.messages import encodable
from sdp_lightning.workflows.workflow import Tokenizer

_NUM_BEFORE = 8  # tokens that are looked at
_STAND_INS = ("\n", ".", "x")  # texts to stand after, where the true one merges with what follows
_PROBE = "x1"


def encode_after(tokens: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of ``text`` where it follows ``tokens``, which stay as they are.

    A tokenizer may write a text otherwise at the beginning than after another one (SentencePiece
    puts a mark of a word there), so both are encoded together. Where they would merge into one
    token, a text that does not merge stands in for what is before.
    """
    text = encodable(text)
    if not text:
        return []
    before = tokenizer.decode(list(tokens)[-_NUM_BEFORE:], skip_special_tokens=False)
    for left in (before, *_STAND_INS):
        first = tokenizer.encode(left, add_special_tokens=False)
        both = tokenizer.encode(left + text, add_special_tokens=False)
        if both[: len(first)] == first:
            return both[len(first) :]
    return tokenizer.encode(text, add_special_tokens=False)


def common_beginning(first: str, second: str, tokenizer: Tokenizer) -> str:
    """The longest beginning that two texts share, where the tokens of both have a boundary."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (first, second)]
    num_tokens = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))
    for end in range(min(len(first), len(second)), -1, -1):
        shared = second[:end]
        if first.startswith(shared):
            tokens = tokenizer.encode(shared, add_special_tokens=False)
            if tokens == ids[1][:num_tokens]:
                return shared
    return ""


def written_in_front(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer itself writes before a text."""
    alone = tokenizer.encode(_PROBE, add_special_tokens=False)
    written = tokenizer.encode(_PROBE, add_special_tokens=True)
    for start in range(len(written) - len(alone) + 1):
        if written[start : start + len(alone)] == alone:
            return written[:start]
    return []


def is_special(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token is left out of texts without special tokens."""
    return bool(tokenizer.decode([token], skip_special_tokens=False)) and not tokenizer.decode(
        [token], skip_special_tokens=True
    )
