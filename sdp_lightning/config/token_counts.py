"""How many tokens many texts have, and what that depends on."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without special ones that a tokenizer adds.

    Tokenizers of transformers take the texts at once, on all cores.
    """
    from transformers import PreTrainedTokenizerBase

    if not texts:
        return []
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    encode: Any = tokenizer
    encoded = encode(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [len(tokens) for tokens in encoded["input_ids"]]


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Digest of a tokenizer, its chat template and the libraries' versions.

    None if that is not all that its tokens depend on: code of its own may do anything.
    """
    from transformers import PreTrainedTokenizerFast

    is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    if not is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    template = repr(tokenizer.chat_template)
    parts = [
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        template,
        repr(tokenizer.special_tokens_map),
        *(importlib.metadata.version(name) for name in _LIBRARIES),
    ]
    if "strftime_now" in template:  # it writes the date
        parts.append(datetime.date.today().isoformat())
    return blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()
