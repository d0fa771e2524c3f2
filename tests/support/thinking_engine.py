"""An engine that says four answers in turn, in a tokenizer with the markers of thoughts."""

from __future__ import annotations

from typing import Any

from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import Segment

TOKENIZER = tiny_tokenizer()
MARKERS = ["<think>", "</think>", "<answer>", "</answer>"]
TOKENIZER.add_special_tokens({"additional_special_tokens": MARKERS})
# {answer}: of the row. Format and answer, format only, neither, both again.
SAID = (
    "<think>a</think><answer>{answer}</answer>",
    "<think>ab</think><answer>no</answer>",
    "<think>abc",
    "<think>abcd</think> <answer>{answer}</answer>",
)


class ThinkingEngine(FakeEngine):
    """Says the texts of ``SAID`` to each prompt ``a+b=`` in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._num: dict[str, int] = {}

    async def generate(self, request: Any, sink: Any) -> Any:
        prompt = TOKENIZER.decode(request.token_ids, skip_special_tokens=True)
        first, second = prompt.removesuffix("=").split("+")
        number = self._num[prompt] = self._num.get(prompt, -1) + 1
        text = SAID[number % len(SAID)].format(answer=int(first) + int(second))
        ids = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_id]
        sink(Segment(self.version or 0, ids, [-3.0] * len(ids)))
        return "stop"
