"""Rows that a reward cannot score, found before the run: no answer, or one that cannot be read.

A reward brings its check as the attribute ``check_row``: ``check_row(row, **keywords)``, with the
keywords of a ``functools.partial``. It raises ``RolloutError`` for a row that is at fault. It may
return a text instead: an answer that only a worker process reads, by the reward's ``can_read``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdp_lightning.errors import RolloutError, RowsError
from sdp_lightning.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

_SHOWN = 5  # rows that an error names
_MANY = 2000  # answers whose reading takes long enough to be said
_ANSWERS_S = 300.0
_READ_S = 10.0  # longest reading of one answer
_CHUNK = 1000  # answers


def refuse_unreadable_rows(reward: object, rows: Iterable[tuple[int, object]]) -> None:
    """Raise ``RowsError`` if there are rows that ``reward`` cannot score.

    It takes as long as the rows take to be read, and their answers: answers beyond 300 s are left
    to the run, with a warning.

    Args:
        reward: a reward, a ``functools.partial`` of one, or a ``RewardPool``. One without a
            ``check_row`` reads no row.
        rows: indices and rows of the dataset; those that are no mappings are passed over.

    Raises:
        RowsError: naming the first rows, and how many there are.
    """
    if isinstance(reward, RewardPool):
        reward = reward.reward
    keywords: dict[str, Any] = {}
    while isinstance(reward, functools.partial):
        keywords = {**reward.keywords, **keywords}
        reward = reward.func  # pyright: ignore[reportUnknownMemberType]
    # foreign: a user's callable
    check: Callable[..., str | None] | None = getattr(reward, "check_row", None)
    if check is None:
        return
    faults: dict[int, str] = {}
    names: dict[int, str] = {}
    unread: dict[str, list[int]] = {}
    num_rows = 0
    for index, row in rows:
        num_rows += 1
        if isinstance(row, Mapping):
            names[index] = repr(row.get("id", index))
            _check(check, row, keywords, index, faults, unread)
    if unread:
        # foreign: a reward's own attribute
        for text in _unreadable(str(getattr(reward, "can_read", "")), list(unread)):
            faults |= dict.fromkeys(unread[text], f"its answer {text!r} cannot be read.")
    if faults:
        named = [f"row {names[index]}: {faults[index]}" for index in list(faults)[:_SHOWN]]
        more = f" And {len(faults) - _SHOWN} more." if len(faults) > _SHOWN else ""
        # foreign: a callable may have no name
        name = getattr(reward, "__name__", reward)
        raise RowsError(
            f"{len(faults)} of {num_rows} rows cannot be scored by {name!r}: {' '.join(named)}"
            f"{more} Correct these rows, or leave them out of the prompts.",
            faults,
        )


def _check(
    check: Callable[..., str | None],
    row: Mapping[str, Any],
    keywords: Mapping[str, Any],
    index: int,
    faults: dict[int, str],
    unread: dict[str, list[int]],
) -> None:
    """Enter a row into ``faults``, or its answer into ``unread``, unless it is good."""
    try:
        text = check(row, **keywords)
    except RolloutError as error:
        faults[index] = str(error)
    else:
        if text is not None:
            unread.setdefault(text, []).append(index)


def _unreadable(can_read: str, texts: Sequence[str]) -> list[str]:
    """Those of ``texts`` for which the reward at the path ``can_read`` gives 0."""
    if len(texts) > _MANY:
        logger.info("reading the answers of the rows: %d different ones", len(texts))
    num_workers = min(-(-len(texts) // 100), len(os.sched_getaffinity(0)), 16)
    settings: dict[str, Any] = {"num_workers": num_workers, "fork_calls": False, "on_kill": "zero"}
    pool = RewardPool(can_read, timeout_s=_READ_S, max_killed_in_a_row=len(texts) + 1, **settings)

    async def read() -> list[str]:
        unreadable: list[str] = []
        deadline = time.monotonic() + _ANSWERS_S
        for start in range(0, len(texts), _CHUNK):
            if time.monotonic() > deadline:
                logger.warning("only %d of %d answers were read in time", start, len(texts))
                break
            chunk = texts[start : start + _CHUNK]
            values = await asyncio.gather(*[pool(text, {}) for text in chunk])
            unreadable += [text for text, value in zip(chunk, values, strict=True) if not value]
        return unreadable

    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop that runs
            return thread.submit(asyncio.run, read()).result()
    finally:
        pool.close()
