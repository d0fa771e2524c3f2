"""Rows that cannot be trained on, found before a run: each rank reads a part of the data set."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from sdp_lightning.config.rollout import PromptsCheck
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import ConfigError, RowsError
from sdp_lightning.prompts.checks import (
    RowFault,
    drop,
    duplicate_ids,
    name_of,
    null_id,
    read_row,
    refuse,
    summary,
)
from sdp_lightning.types import Row
from sdp_lightning.workflows.prompt_lengths import PromptMeter
from sdp_lightning.workflows.workflow import RolloutWorkflow, Tokenizer

logger = logging.getLogger(__name__)

VAL_PROMPTS = "val_prompts"
CHUNK = 10_000  # rows that are held at once
_ROWS_S = 60.0  # of rows that are read while a fault is an error
_ROW_S = 600.0  # longest reading of one row
_SAY_S = 10.0
_WAIT_S = 3600.0  # longest wait for the rows of another rank


class RowJudge:
    """Judges rows by their prompts, as a workflow makes them.

    Args:
        workflow: rolls the rows out.
        tokenizer: tokenizer of the policy.
    """

    def __init__(self, workflow: RolloutWorkflow, tokenizer: Tokenizer) -> None:
        self._workflow, self._meter = workflow, PromptMeter(tokenizer)

    def measure(self, rows: Mapping[int, Row]) -> tuple[dict[int, int], list[RowFault]]:
        """Tokens of the prompts, as far as they are known, and the faults of the other rows.

        Args:
            rows: rows by their index.
        """
        lengths: dict[int, int] = {}
        faults: list[RowFault] = []
        found = self._workflow.prompt_lengths(list(rows.values()), self._meter)
        for (index, row), length in zip(rows.items(), found, strict=True):
            if (fault := null_id(index, row)) is not None:
                faults.append(fault)
            elif isinstance(length, int):
                lengths[index] = length
            elif length is not None:
                text = f"{name_of(index, row)}: {length.text}"
                faults.append(RowFault(index, length.cause, text))
        return lengths, faults

    def too_long(
        self, index: int, row: Row, length: int, max_length: int | None
    ) -> RowFault | None:
        """The fault of a prompt of ``length`` tokens that leaves no room for a completion.

        Args:
            index: index of the row.
            row: the row.
            length: tokens of its prompt.
            max_length: tokens of the longest sequence of the engine; None is not known.
        """
        most = self._workflow.longest_prompt(max_length)
        if most is None or length <= most:
            return None
        where = "" if max_length is None else f", of the engine's {max_length}"
        text = f"its prompt has {length} tokens, and {max(most, 0)} leave room for a completion"
        return RowFault(index, "prompt too long", f"{name_of(index, row)}: {text}{where}.")

    def fault_of(self, index: int, row: Row, max_length: int | None = None) -> RowFault | None:
        """The fault of one row, as a stream gives it; other rows' ids are not known."""
        if not isinstance(row, Mapping):
            text = f"row {index} is {type(row).__name__}; rows must be mappings."
            return RowFault(index, "no mapping", text)
        lengths, faults = self.measure({index: row})
        if index in lengths and (fault := self.too_long(index, row, lengths[index], max_length)):
            faults.append(fault)
        return faults[0] if faults else self._unscored(index, row)

    def _unscored(self, index: int, row: Row) -> RowFault | None:
        try:
            self._workflow.check_rows([(index, row)])
        except RowsError as error:
            texts = list(error.faults.values())
            return RowFault(index, "no score", f"{name_of(index, row)}: {' '.join(texts)}")
        return None


class RowChecks:
    """Finds the rows of a data set that cannot be trained on.

    A collective: each rank reads a part of the rows, and all ranks know the faults of all.

    Args:
        rows: the data set.
        workflow: rolls the rows out.
        tokenizer: tokenizer of the policy.
        mode: ``"error"`` reads rows for 60 s, and leaves later ones to the run, with a warning;
            ``"drop"`` reads all, so that the same rows are left out whenever it is done.
        ranks: the ranks that train together; None is this process alone.
        what: setting with the rows, in messages; those of ``"val_prompts"`` may be repeated.
        max_length: tokens of the longest sequence of the engine, if that is known before it starts.

    Raises:
        ConfigError: if there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        workflow: RolloutWorkflow,
        tokenizer: Tokenizer,
        *,
        mode: PromptsCheck = "error",
        ranks: RankGroup | None = None,
        what: str = "prompts",
        max_length: int | None = None,
    ) -> None:
        if len(rows) == 0:
            raise ConfigError(f"{what} is empty: a run needs at least one row.")
        ranks = RankGroup() if ranks is None else ranks
        self._rows, self._workflow, self.mode, self._what = rows, workflow, mode, what
        self._judge, self.max_length = RowJudge(workflow, tokenizer), max_length
        self._ids: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._faults: dict[int, RowFault] = {}
        first, last = (len(rows) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        self._num_read = self._read(range(first, last))
        mine = self._num_read, self._ids, self._lengths, self._faults
        parts = ranks.all_gather(f"checking the rows of {what}", mine, timeout_s=_WAIT_S)
        if ranks.size > 1:
            self._num_read = sum(number for number, *_ in parts)
            for _, ids, lengths, faults in parts:
                self._ids |= ids
                self._lengths |= lengths
                self._faults |= faults
        if what != VAL_PROMPTS:
            for fault in duplicate_ids(sorted(self._ids.items())):
                self._faults.setdefault(fault.index, fault)

    @property
    def faults(self) -> list[RowFault]:
        """One fault of each row that has any, in the order of the rows."""
        most = self._workflow.longest_prompt(self.max_length)
        found = dict(self._faults)
        for index, length in self._lengths.items():
            if most is not None and length > most and index not in found:
                fault = self._judge.too_long(index, self._rows[index], length, self.max_length)
                assert fault is not None
                found[index] = fault
        return sorted(found.values())

    @property
    def num_good(self) -> int:
        """Number of rows without a fault."""
        return len(self._rows) - len(self.faults)

    @property
    def summary(self) -> str:
        """The number of rows and, if some have faults, how many by cause, and the first of them."""
        faults = self.faults
        return summary(faults, self._num_read, self._what) if faults else f"{len(self._rows)} rows"

    def refuse(self) -> None:
        """Raise ``ConfigError`` if rows have faults, with the summary, unless they are dropped."""
        if self.mode == "error":
            refuse(self.faults, self._num_read, self._what)

    def kept(self) -> Sequence[Row]:
        """The rows that can be trained on.

        Raises:
            ConfigError: if rows have faults, unless these are dropped, or all have.
        """
        self.refuse()
        return drop(self._rows, self.faults, self._what)

    def good_rows(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[int, Row]]:
        """Rows without a fault, with their indices: those at every ``num_ranks``-th index."""
        bad = {fault.index for fault in self.faults}
        for index in range(rank, len(self._rows), num_ranks):
            if index not in bad:
                yield index, self._rows[index]

    def _read(self, indices: range) -> int:
        """Read and judge the rows of ``indices``; returns for how many there was time."""
        begin = said = time.monotonic()
        number = 0
        while number < len(indices):
            if self.mode == "error" and time.monotonic() - begin > _ROWS_S:
                text = "only %d of %d rows of %s were checked, in %.0f s"
                logger.warning(text, number, len(indices), self._what, _ROWS_S)
                break
            if time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                logger.info("%d of %d rows of %s checked", number, len(indices), self._what)
            number += self._read_chunk(indices[number : number + CHUNK], begin)
        self._check_answers(indices[:number])
        return number

    def _read_chunk(self, indices: range, begin: float) -> int:
        good: dict[int, Row] = {}
        read = self._read_rows(indices, begin)
        for index, row in zip(indices, read, strict=False):
            if isinstance(row, RowFault):
                self._faults[index] = row
                continue
            good[index] = row
            if "id" in row:
                self._ids[index] = str(row["id"])
        lengths, faults = self._judge.measure(good)
        self._lengths |= lengths
        self._faults |= {fault.index: fault for fault in faults}
        return len(read)

    def _read_rows(self, indices: range, begin: float) -> list[Row | RowFault]:
        """The rows for which there is time, read in a thread: a data set may hang.

        Raises:
            ConfigError: naming the row that did not come.
        """
        rows: list[Row | RowFault] = []

        def read() -> None:
            for index in indices:
                if self.mode == "error" and time.monotonic() - begin > _ROWS_S:
                    break
                rows.append(read_row(self._rows, index))

        thread = threading.Thread(target=read, name="sdp-rows", daemon=True)
        thread.start()
        number, seen_at = 0, time.monotonic()
        while thread.is_alive():
            thread.join(1.0)
            if len(rows) > number:
                number, seen_at = len(rows), time.monotonic()
            elif thread.is_alive() and time.monotonic() - seen_at > _ROW_S:
                raise ConfigError(
                    f"row {indices[number]} of {self._what} was not read within {_ROW_S:.0f} s: "
                    "its data set hangs."
                )
        return rows

    def _check_answers(self, indices: range) -> None:
        """Enter the rows that the workflow cannot score; it names those of one reward at a time."""
        while True:
            rows = (
                (index, row)
                for index in indices
                if index not in self._faults
                and not isinstance(row := read_row(self._rows, index), RowFault)
            )
            try:
                return self._workflow.check_rows(rows)
            except RowsError as error:
                new = {i: text for i, text in error.faults.items() if i not in self._faults}
                if not new:
                    raise
                for index, text in new.items():
                    name = name_of(index, self._rows[index])
                    self._faults[index] = RowFault(index, "no score", f"{name}: {text}")
