"""How many tokens prompts have: written as rollouts write them, and tokenized many at once.

Lengths of many prompts are kept in the package's cache folder, under a digest of all that they
depend on: the prompts, the tokenizer with its chat template, settings, and the code that writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from sdp_lightning.config.build_cache import build_once
from sdp_lightning.config.token_counts import count_tokens, tokenizer_digest
from sdp_lightning.errors import RolloutError
from sdp_lightning.types import Row
from sdp_lightning.workflows.chat.rendering import Tools
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat_template import opening_text
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

LEAST_CACHED = 1000  # prompts whose lengths are worth a file
_FILE = "lengths.json"
_DEFAULTS = ChatSettings()


class PromptFault(NamedTuple):
    """Why a row has no prompt.

    Attributes:
        cause: one of a few texts.
        text: a sentence about it.
    """

    cause: str
    text: str


class Opening(NamedTuple):
    """What a prompt is written from.

    Attributes:
        prompt: a text or messages.
        tools: JSON schemas of the functions that it describes.
    """

    prompt: Any
    tools: Tools = ()


PromptLength = int | PromptFault


class PromptMeter:
    """Measures prompts in tokens.

    Args:
        tokenizer: tokenizer of the policy; not changed while this is in use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def of_rows(
        self,
        rows: Sequence[Row],
        opening: Callable[[Row], Opening],
        *,
        use_chat_template: bool,
        settings: ChatSettings = _DEFAULTS,
    ) -> list[PromptLength]:
        """Tokens of the prompt of each row, or what is wrong with it.

        Args:
            rows: the rows.
            opening: the prompt of a row.
            use_chat_template: whether a text is a message of the user.
            settings: how prompts are written.
        """
        measured: dict[int, PromptLength] = {}
        prompts: dict[int, Opening] = {}
        for number, row in enumerate(rows):
            try:
                prompts[number] = opening(row)
            except RolloutError as error:
                measured[number] = PromptFault("no prompt", str(error))
            except (KeyError, TypeError) as error:
                measured[number] = PromptFault("no prompt", f"it has none: {error!r}.")
        lengths = self.lengths(
            list(prompts.values()), use_chat_template=use_chat_template, settings=settings
        )
        measured |= dict(zip(prompts, lengths, strict=True))
        return [measured[number] for number in range(len(rows))]

    def lengths(
        self,
        prompts: Sequence[Opening],
        *,
        use_chat_template: bool,
        settings: ChatSettings = _DEFAULTS,
    ) -> list[PromptLength]:
        """Tokens of each of ``prompts``, or what is wrong with it."""
        key = None
        if len(prompts) >= LEAST_CACHED:
            key = self._key(prompts, [use_chat_template, asdict(settings)])
        if key is None:
            return self._measure(prompts, use_chat_template, settings)

        def build(folder: Path) -> None:
            measured = self._measure(prompts, use_chat_template, settings)
            (folder / _FILE).write_text(json.dumps(measured))

        try:
            read = json.loads((build_once(f"prompt_lengths/{key}", build) / _FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:  # no room, no rights, a damaged file
            logger.warning("the lengths of prompts are not cached: %s", error)
            return self._measure(prompts, use_chat_template, settings)
        return [each if isinstance(each, int) else PromptFault(*each) for each in read]

    def _measure(
        self, prompts: Sequence[Opening], use_chat_template: bool, settings: ChatSettings
    ) -> list[PromptLength]:
        texts: dict[int, str] = {}
        result: list[PromptLength] = [0] * len(prompts)
        for number, (prompt, tools) in enumerate(prompts):
            if prompt is None:
                result[number] = PromptFault("no prompt", "its prompt is None.")
                continue
            if _is_blank(prompt):
                result[number] = PromptFault("empty prompt", "its prompt is empty.")
                continue
            try:
                texts[number] = opening_text(
                    prompt,
                    self.tokenizer,
                    use_chat_template=use_chat_template,
                    tools=tools,
                    settings=settings,
                )
            except RolloutError as error:
                result[number] = PromptFault("prompt refused", str(error))
        lengths = count_tokens(self.tokenizer, list(texts.values()))
        fronts = {
            is_chat: settings.in_front(self.tokenizer, is_chat=is_chat)
            for is_chat in {use_chat_template or not isinstance(prompts[n][0], str) for n in texts}
        }
        for (number, text), length in zip(texts.items(), lengths, strict=True):
            front = fronts[use_chat_template or not isinstance(prompts[number][0], str)]
            # A template may have written it, too.
            is_written = text.startswith(self.tokenizer.decode(front)) if front else True
            fault = PromptFault("empty prompt", "its prompt has no tokens.")
            result[number] = length + (0 if is_written else len(front)) if length else fault
        return result

    def _key(self, prompts: Sequence[Opening], settings: Any) -> str | None:
        """Digest of all that the lengths depend on; None if that cannot be said."""
        if self._digest is None:
            return None
        digest = blake2b(self._digest.encode(), digest_size=20)
        for value in (settings, *prompts):
            try:
                digest.update(json.dumps(value).encode() + b"\n")
            except (TypeError, ValueError):  # it has values of other types
                return None
        return digest.hexdigest()

    @cached_property
    def _digest(self) -> str | None:
        """Digest of the tokenizer and of the code that writes prompts; None if it has no such."""
        digest = tokenizer_digest(self.tokenizer)
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
