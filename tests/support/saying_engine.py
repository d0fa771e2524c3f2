"""An engine that says given texts, in the tokens of a tokenizer with ``<think>`` and its end."""

from __future__ import annotations

from typing import Any

from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import Segment

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})


class Says(FakeEngine):
    """Says each text of ``texts`` in turn, ended by the end of text, or cut off without it."""

    def __init__(self, *texts: str, is_cut: bool = False) -> None:
        super().__init__()
        self.texts, self.is_cut, self.num = texts, is_cut, 0

    async def generate(self, request: Any, sink: Any) -> Any:
        text = self.texts[self.num % len(self.texts)]
        self.num += 1
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        ids += [] if self.is_cut else [TOKENIZER.eos_token_id]
        sink(Segment(self.version or 0, ids, [-0.1] * len(ids)))
        return "length" if self.is_cut else "stop"
