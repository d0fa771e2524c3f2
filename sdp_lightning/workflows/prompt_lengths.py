"""How many tokens prompts have: written as rollouts write them, and tokenized many at once.

Lengths of many prompts are kept in the package's cache folder, under a digest of all that they
depend on: the prompts, the tokenizer with its chat template, settings, and the code that writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.token_counts import count_tokens, tokenizer_digest
from sdp_lightning.errors import RolloutError
from sdp_lightning.types import Row
from sdp_lightning.workflows.chat_template import opening_text
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

LEAST_CACHED = 1000  # prompts whose lengths are worth a file
_FILE = "lengths.json"


class PromptFault(NamedTuple):
    """Why a row has no prompt.

    Attributes:
        cause: one of a few texts.
        text: a sentence about it.
    """

    cause: str
    text: str


PromptLength = int | PromptFault


class PromptMeter:
    """Measures prompts in tokens.

    Args:
        tokenizer: tokenizer of the policy; not changed while this is in use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def of_rows(
        self, rows: Sequence[Row], opening: Callable[[Row], Any], *, use_chat_template: bool
    ) -> list[PromptLength]:
        """Tokens of the prompt of each row, or what is wrong with it.

        Args:
            rows: the rows.
            opening: the prompt of a row, a text or messages.
            use_chat_template: whether a text is a message of the user.
        """
        measured: dict[int, PromptLength] = {}
        prompts: dict[int, Any] = {}
        for number, row in enumerate(rows):
            try:
                prompts[number] = opening(row)
            except RolloutError as error:
                measured[number] = PromptFault("no prompt", str(error))
            except (KeyError, TypeError) as error:
                measured[number] = PromptFault("no prompt", f"it has none: {error!r}.")
        lengths = self.lengths(list(prompts.values()), use_chat_template=use_chat_template)
        measured |= dict(zip(prompts, lengths, strict=True))
        return [measured[number] for number in range(len(rows))]

    def lengths(self, prompts: Sequence[Any], *, use_chat_template: bool) -> list[PromptLength]:
        """Tokens of each of ``prompts``, texts or messages, or what is wrong with it."""
        key = None
        if len(prompts) >= LEAST_CACHED:
            key = self._key(prompts, use_chat_template=use_chat_template)
        if key is None:
            return self._measure(prompts, use_chat_template=use_chat_template)

        def build(folder: Path) -> None:
            measured = self._measure(prompts, use_chat_template=use_chat_template)
            (folder / _FILE).write_text(json.dumps(measured))

        try:
            read = json.loads((build_once(f"prompt_lengths/{key}", build) / _FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:  # no room, no rights, a damaged file
            logger.warning("the lengths of prompts are not cached: %s", error)
            return self._measure(prompts, use_chat_template=use_chat_template)
        return [each if isinstance(each, int) else PromptFault(*each) for each in read]

    def _measure(self, prompts: Sequence[Any], *, use_chat_template: bool) -> list[PromptLength]:
        from jinja2 import TemplateError

        texts: dict[int, str] = {}
        result: list[PromptLength] = [0] * len(prompts)
        for number, prompt in enumerate(prompts):
            if prompt is None:
                result[number] = PromptFault("no prompt", "its prompt is None.")
                continue
            if _is_blank(prompt):
                result[number] = PromptFault("empty prompt", "its prompt is empty.")
                continue
            try:
                texts[number] = opening_text(
                    prompt, self._tokenizer, use_chat_template=use_chat_template
                )
            except (RolloutError, TemplateError) as error:
                result[number] = PromptFault("prompt refused", str(error))
        lengths = count_tokens(self._tokenizer, list(texts.values()))
        for number, length in zip(texts, lengths, strict=True):
            fault = PromptFault("empty prompt", "its prompt has no tokens.")
            result[number] = length or fault
        return result

    def _key(self, prompts: Sequence[Any], *, use_chat_template: bool) -> str | None:
        """Digest of all that the lengths depend on; None if that cannot be said."""
        if self._digest is None:
            return None
        digest = blake2b(f"{self._digest} {use_chat_template}".encode(), digest_size=20)
        for prompt in prompts:
            try:
                digest.update(json.dumps(prompt).encode() + b"\n")
            except (TypeError, ValueError):  # it has values of other types
                return None
        return digest.hexdigest()

    @cached_property
    def _digest(self) -> str | None:
        """Digest of the tokenizer and of the code that writes prompts; None if it has no such."""
        digest = tokenizer_digest(self._tokenizer)
        code = [file.read_text() for file in sorted(Path(__file__).parent.rglob("*.py"))]
        return digest and blake2b("\0".join([digest, *code]).encode(), digest_size=20).hexdigest()


def _is_blank(prompt: Any) -> bool:
    """Whether a text, or the messages, say nothing."""
    if isinstance(prompt, str):
        return not prompt.strip()
    if isinstance(prompt, (list, tuple)):
        spoken = [m for m in prompt if not isinstance(m, Mapping) or m.get("role") != "system"]
        return all(map(_is_blank, spoken or prompt))
    if not isinstance(prompt, Mapping):
        return prompt is None
    said = (prompt.get(name) for name in ("content", "text", "tool_calls"))
    return all(_is_blank(each) for each in said)
