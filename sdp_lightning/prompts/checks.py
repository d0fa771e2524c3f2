"""Faults of dataset rows, found before a run: such rows are refused together, or left out.

Pure functions of rows; what is wrong with a prompt or an answer others find.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from sdp_lightning.errors import ConfigError
from sdp_lightning.types import Row

logger = logging.getLogger(__name__)

_SHOWN = 5  # rows that a message names


@dataclass(frozen=True, order=True)
class RowFault:
    """Why a row cannot be trained on.

    Args:
        index: index of the row in its data set.
        cause: one of a few texts, by which rows are counted: ``"duplicate id"``.
        text: a sentence about this row, which names it.
    """

    index: int
    cause: str
    text: str


def read_row(rows: Sequence[Row], index: int) -> Row | RowFault:
    """Row ``index``, or why there is none."""
    try:
        row: object = rows[index]
    except Exception as error:
        return RowFault(index, "not readable", f"row {index}: reading it failed: {error!r}.")
    if not isinstance(row, Mapping):
        text = f"row {index} is {type(row).__name__}; rows must be mappings."
        return RowFault(index, "no mapping", text)
    return row


def name_of(index: int, row: Row) -> str:
    """The row as messages name it: its id, else its index."""
    return f"row {row.get('id', index)!r}"


def null_id(index: int, row: Row) -> RowFault | None:
    """The fault of a row whose id says nothing: None, NaN, or an empty text."""
    given = row.get("id", index)
    if given is None or given == "" or (isinstance(given, float) and given != given):
        text = f"row {index}: its id is {given!r}. Give it one, or leave the key out."
        return RowFault(index, "null id", text)
    return None


def duplicate_ids(ids: Iterable[tuple[int, str]]) -> list[RowFault]:
    """Faults of the rows with an id that an earlier one has.

    Args:
        ids: indices of rows, in rising order, and their ids.
    """
    first: dict[str, int] = {}
    faults: list[RowFault] = []
    for index, name in ids:
        if (other := first.setdefault(name, index)) != index:
            text = f"row {index}: its id {name!r} is that of row {other}."
            faults.append(RowFault(index, "duplicate id", text))
    return faults


class SeenIds:
    """Knows the ids of an epoch's rows that were read one after another: the last 100,000."""

    def __init__(self, most: int = 100_000) -> None:
        self._most, self._epoch, self._is_said = most, -1, False
        self._first: dict[str, int] = {}

    def fault_of(self, epoch: int, index: int, row: Row) -> RowFault | None:
        """The fault of a row whose id an earlier one of its epoch has."""
        if epoch != self._epoch:
            self._epoch, self._first = epoch, {}
        if "id" not in row:
            return None
        name = str(row["id"])
        if (other := self._first.setdefault(name, index)) != index:
            text = f"row {index}: its id {name!r} is that of row {other}."
            return RowFault(index, "duplicate id", text)
        if len(self._first) > self._most:
            del self._first[next(iter(self._first))]
            if not self._is_said:
                self._is_said = True
                logger.warning("duplicate ids are looked for in the last %d rows", self._most)
        return None


def refuse(faults: Sequence[RowFault], num_rows: int, what: str) -> None:
    """Raise ``ConfigError`` with the ``faults`` by cause, unless there are none.

    Args:
        faults: at most one for a row.
        num_rows: number of rows that were checked.
        what: setting with the rows: ``"prompts"``.
    """
    if faults:
        raise ConfigError(
            f"{summary(faults, num_rows, what)} Correct these rows, or leave them out with "
            "prompts_check='drop' in the RolloutConfig."
        )


def drop(rows: Sequence[Row], faults: Sequence[RowFault], what: str) -> Sequence[Row]:
    """The rows without a fault, in their order; how many are left out is logged.

    A row that has no id and comes after one that is left out gets its index as ``"id"``, so that
    its name does not depend on what is left out.

    Raises:
        ConfigError: if no row is left.
    """
    if not faults:
        return rows
    left_out = {fault.index for fault in faults}
    kept = [index for index in range(len(rows)) if index not in left_out]
    text = summary(faults, len(rows), what)
    if not kept:
        raise ConfigError(f"{text} No row is left.")
    logger.warning("%s They are left out (prompts_check='drop'): %d are left.", text, len(kept))
    chosen = KeptRows(rows, kept)
    return list(chosen) if isinstance(rows, list | tuple) else chosen


class KeptRows(Sequence[Row]):
    """Some rows of a data set, in its order, which are read when they are used.

    Args:
        rows: all rows.
        indices: indices of those that are kept, in rising order.
    """

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        row = self.rows[self.indices[index]]
        return row if "id" in row else {**row, "id": self.indices[index]}


def summary(faults: Sequence[RowFault], num_rows: int, what: str) -> str:
    """How many of ``num_rows`` rows have faults, by cause, and the first of them."""
    counts = Counter(fault.cause for fault in faults)
    causes = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
    named = " ".join(fault.text for fault in sorted(faults)[:_SHOWN])
    more = f" And {len(faults) - _SHOWN} more." if len(faults) > _SHOWN else ""
    return f"{len(faults)} of {num_rows} rows of {what} cannot be used ({causes}): {named}{more}"
