"""One row of each kind is written before a run, so that no step is made with what a template loses.

Rows are of one kind if their prompts have one shape: text, or messages with the same roles, keys
and kinds of content.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.types import Row
from sdp_lightning.workflows.chat.messages import as_messages
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.workflow import Tokenizer

logger = logging.getLogger(__name__)

MOST_KINDS = 64
_MOST_OPENINGS = 4
_ROWS_S = 10.0


def kind_of(value: Any) -> Any:
    """The shape of a row or a prompt; equal for values of one kind.

    >>> kind_of({"prompt": "1+1?", "answer": 2}) == kind_of({"prompt": "7-4?", "answer": 3})
    True
    """
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        return tuple(
            (key, part if key == "role" and isinstance(part, str) else kind_of(part))
            for key, part in fields.items()
        )
    if isinstance(value, list | tuple):
        return tuple(kind_of(part) for part in cast("Sequence[Any]", value))
    return type(value).__name__, bool(value) if isinstance(value, str) else None


def first_of_each_kind(
    rows: Iterable[tuple[int, Row]], key: str | None = None, *, most: int = MOST_KINDS
) -> Iterator[tuple[int, Row]]:
    """The first row of each kind, by the value of ``key`` or by all values.

    Rows beyond 10 s of reading, and kinds beyond ``most``, are left to the run.
    """
    seen: set[Any] = set()
    deadline = time.monotonic() + _ROWS_S
    for number, (index, row) in enumerate(rows):
        if time.monotonic() > deadline:
            logger.info("the prompts of the first %d rows were looked at", number)
            return
        kind = kind_of(row if key is None else row.get(key)) if isinstance(row, Mapping) else None
        if kind in seen:
            continue
        if len(seen) == most:
            logger.info("the prompts of the first %d kinds of rows were looked at", most)
            return
        seen.add(kind)
        yield index, row


def refuse_unwritable(rows: Iterable[tuple[int, Row]], write: Callable[[Row], object]) -> None:
    """Raise ``ConfigError``, naming the row, if ``write`` cannot make tokens of its prompt."""
    for index, row in rows:
        try:
            write(row)
        except RolloutError as error:
            raise ConfigError(f"row {_name(row, index)!r}: {error}") from error


def refuse_unwritable_openings(
    rows: Iterable[tuple[int, Row]],
    reset: Callable[[Row], Awaitable[Any]],
    write: Callable[[Any], object],
) -> None:
    """:func:`refuse_unwritable` for the prompts that environments make of a few kinds of rows.

    Args:
        rows: indices and rows.
        reset: makes a prompt of a row. What it raises is left to the run, which counts it.
        write: makes tokens of a prompt.
    """

    async def prompts() -> list[tuple[int, Row]]:
        made: list[tuple[int, Row]] = []
        for index, row in first_of_each_kind(rows, most=_MOST_OPENINGS):
            name = _name(row, index)
            [prompt] = await asyncio.gather(reset(row), return_exceptions=True)
            if isinstance(prompt, Exception):
                logger.warning("row %r gave no prompt to look at: %s", name, prompt)
            else:
                made.append((index, {"id": name, "prompt": prompt}))
        return made

    with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop that runs
        kinds = thread.submit(asyncio.run, prompts()).result()
    refuse_unwritable(kinds, lambda row: write(row["prompt"]))


def _name(row: Any, index: int) -> object:
    return row.get("id", index) if isinstance(row, Mapping) else index


def say_without_effect(prompt: Any, tokenizer: Tokenizer, settings: ChatSettings) -> None:
    """Warn of arguments of the chat template that change nothing of ``prompt``; None is no chat."""
    given = settings.chat_template_kwargs
    if given and prompt is None:
        logger.warning("chat_template_kwargs has no effect: the prompts are plain text")
        return
    for name in given:
        fewer = ChatSettings({key: given[key] for key in given if key != name})
        messages = as_messages(prompt, "prompt")
        texts = {s.template(tokenizer).opening(messages, tokenizer) for s in (settings, fewer)}
        if len(texts) == 1:
            logger.warning(
                "chat_template_kwargs: %s=%r changes nothing of the first prompt; it may be the "
                "chat template's default",
                *(name, given[name]),
            )
