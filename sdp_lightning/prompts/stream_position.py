"""Places in prompts that are read one after another, and how they are found again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.fingerprint import digest
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.stream import RESTART
from sdp_lightning.types import Row

logger = logging.getLogger(__name__)


class OtherRowsError(ConfigError):
    """The rows before a position are others than those of its checkpoint."""


@dataclass(frozen=True)
class Position:
    """The place after a row.

    Attributes:
        epoch: epoch of the row.
        index: rows of that epoch up to here.
        count: rows of all epochs up to here.
        source: the source's state before the item that the row is in; None is the epoch's start.
        skip: rows between that state and here.
        digest_before: digest of the epoch's rows up to that state; empty at its start.
        digest: digest of the epoch's rows up to here.
    """

    epoch: int = 0
    index: int = 0
    count: int = 0
    source: Any = None
    skip: int = 0
    digest_before: str = ""
    digest: str = ""

    @property
    def by_count(self) -> Position:
        """The same place, from the start of the epoch."""
        return replace(self, source=None, skip=self.index, digest_before="")


Placed = Iterator[tuple[Row, Position]]


def rows_after(rows: IterableRows, position: Position, on_row: Callable[[], bool]) -> Placed:
    """The rows of the epoch after ``position``, whose item, or whole epoch, is read again.

    Args:
        rows: the source.
        position: the start, or that of a checkpoint.
        on_row: called for each row that is read again; False ends the search.

    Raises:
        OtherRowsError: if the rows before it are not those of the checkpoint.
    """
    placed = start = None
    if position.source is not None:
        start = rows.start
        placed = _find(rows, position, on_row)
        if placed is None:
            logger.warning(
                "the state of the prompts %s does not lead back to row %d of epoch %d.",
                *(rows.name, position.index, position.epoch),
            )
    if placed is None:
        if position.index:
            logger.warning(
                "reading %d rows of the prompts %s again to find the place of the checkpoint: it "
                "takes the time that they take to be read.",
                *(position.index, rows.name),
            )
        placed = _find(rows, position.by_count, on_row, start)
    if placed is None:
        raise OtherRowsError(
            f"the checkpoint was made with other prompts: the first {position.index} rows of "
            f"{rows.name} in epoch {position.epoch} are not those that it had read. {RESTART}"
        )
    return placed


def rows_of_epoch(rows: IterableRows, base: Position, start: Any = None) -> Placed:
    """The rows of the epoch of ``base`` after its source's state, or after ``start``."""
    place = base
    for source, item in rows.open(base.epoch, start if base.source is None else base.source):
        before = place.digest
        for skip, row in enumerate(item, 1):
            place = replace(
                place,
                index=place.index + 1,
                count=place.count + 1,
                source=source,
                skip=skip,
                digest_before=before,
                digest=digest(row, place.digest),
            )
            yield row, place


def _find(
    rows: IterableRows, position: Position, on_row: Callable[[], bool], start: Any = None
) -> Placed | None:
    """The rows after ``position``; None if those before it are others."""
    base = replace(
        position,
        index=position.index - position.skip,
        count=position.count - position.skip,
        digest=position.digest_before,
    )
    placed, found = rows_of_epoch(rows, base, start), base
    for _ in range(position.skip):
        following = next(placed, None)
        if following is None or not on_row():
            return None
        _, found = following
    return placed if found.digest == position.digest else None
