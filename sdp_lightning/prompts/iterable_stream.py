"""Prompts that are read one after another, a few ahead, by a thread of their own.

A source may block, for a network or for ever, and nothing else waits for it meanwhile. Only rows
that were read ahead or given back are kept here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.checks import RowFault, SeenIds
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.stream import RESTART, PromptRow
from sdp_lightning.prompts.stream_position import (
    OtherRowsError,
    Position,
    rows_after,
    rows_of_epoch,
)
from sdp_lightning.types import Row

logger = logging.getLogger(__name__)

READ_AHEAD = 32  # rows of this rank
_POLL_S, _END_S = 0.1, 2.0
MOST_DROPPED = 10_000  # rows of this rank in a row, none of them good
_SAID = {10**power for power in range(10)}  # numbers of dropped rows that are said


class IterableStream:
    """Reads the rows in their order for ``num_epochs``; None is no end.

    Rows that were given back come first. Each of several ranks reads all rows, and takes every
    ``num_ranks``-th, across the ends of epochs.

    Args:
        rows: rows, or batches of rows.
        num_epochs: number of passes.
        rank: rank of this process.
        num_ranks: number of ranks.
        fills: whether rows of one more epoch may be wanted.
        timeout_s: longest wait in seconds for the next row while a position is restored.
        judge: the fault of a row and its index, if it cannot be trained on.
        drops: whether such a row is left out, with a warning, as is one with the id of an earlier
            one of its epoch, as far as they were read here; else it ends the run.

    Raises:
        ConfigError: if a source that can be read once is to be read again, or ranks would read a
            source that shuffles.
    """

    def __init__(
        self,
        rows: IterableRows,
        *,
        num_epochs: int | None,
        rank: int = 0,
        num_ranks: int = 1,
        fills: bool = False,
        timeout_s: float = 600.0,
        judge: Callable[[int, Row], RowFault | None] = lambda index, row: None,
        drops: bool = False,
    ) -> None:
        if rows.is_one_shot and (num_epochs != 1 or fills):
            raise ConfigError(
                f"the prompts {rows.name!r} can be read once: give the function that "
                "makes it, or set num_epochs=1 (and last_batch 'short' or 'drop')."
            )
        if rows.shuffles and num_ranks > 1:
            raise ConfigError(
                f"the DataLoader of the prompts shuffles, and {num_ranks} processes would each "
                "read another order: give its dataset itself."
            )
        self._rows, self._num_epochs, self._timeout_s = rows, num_epochs, timeout_s
        self._rank, self._num_ranks = rank, num_ranks
        self._judge, self._drops = judge, drops
        self.num_dropped = self._num_dropped_in_a_row = 0
        self._seen = SeenIds()
        self._changed = threading.Condition()
        self._on_ready: Callable[[], None] = lambda: None
        self._returned: deque[PromptRow] = deque()
        self._ahead: deque[tuple[PromptRow, Position]] = deque()
        self._position = Position()  # of the row that was handed out last
        self._done: set[int] = (
            set()
        )  # numbers, over all epochs, of later rows that other ranks had begun
        self._num_extra = 0
        self._error: RolloutError | ConfigError | None = None
        self._is_at_end = self._is_placed = self._is_starved = self._is_closed = False
        self._read_at = time.monotonic()
        self._thread: threading.Thread | None = None

    # The consumer's side -------------------------------------------------------------------------

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Call ``on_ready``, in the reading thread, when :meth:`next` has more to say than None."""
        self._on_ready = on_ready

    @property
    def is_exhausted(self) -> bool:
        """Whether no row is left, unless one is given back or asked for beyond the end."""
        with self._changed:
            if self._returned or self._num_extra:
                return False
            return self._is_beyond(self._ahead[0][0].epoch) if self._ahead else self._is_at_end

    @property
    def awaited_s(self) -> float | None:
        """Seconds for which a row has been awaited; None if none is."""
        with self._changed:
            return time.monotonic() - self._read_at if self._is_starved else None

    def next(self, wait_s: float = 0.0) -> PromptRow | None:
        """The next row, or None when exhausted, or when it was not read within ``wait_s``.

        Raises:
            RolloutError: if reading failed, or an epoch is empty.
        """
        with self._changed:
            if self._returned:
                return self._returned.popleft()
            self._start()
            self._changed.wait_for(lambda: self._is_ready or self.is_exhausted, wait_s)
            if self.is_exhausted or not self._is_ready:
                self._is_starved = not self.is_exhausted
                return None
            if not self._ahead:
                assert self._error is not None
                raise self._error
            row, self._position = self._ahead.popleft()
            self._done = {number for number in self._done if number >= self._position.count}
            self._num_extra -= self._is_beyond(row.epoch)
            self._changed.notify_all()
            return row

    def extend(self, count: int) -> None:
        """Go on for ``count`` rows of the epochs after the last one."""
        with self._changed:
            self._num_extra += count
            self._changed.notify_all()

    def give_back(self, row: PromptRow) -> None:
        """Hand ``row`` out again, before any new row."""
        with self._changed:
            self._returned.append(row)

    def read(self, epoch: int, index: int) -> PromptRow:
        """Raises ``RolloutError``: a row cannot be read again by its index."""
        raise RolloutError(
            f"row {index} of epoch {epoch} was in flight, and is not in the checkpoint: a stream "
            f"cannot go back to it. {RESTART}"
        )

    def close(self) -> None:
        """End the reading thread. Safe to call twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_END_S)
            if self._thread.is_alive():
                logger.warning("the prompts %s still wait for a row: left behind.", self._rows.name)

    # Checkpoints ---------------------------------------------------------------------------------

    @property
    def returned(self) -> list[PromptRow]:
        """The rows that were given back, and come next."""
        with self._changed:
            return list(self._returned)

    def state_dict(self) -> dict[str, Any]:
        """The position and the places of the rows given back; ``source`` is the source's own."""
        return self._state_at(self._position)

    def state_by_count(self) -> dict[str, Any]:
        """The same without the source's own state: all rows before are read again."""
        return self._state_at(self._position.by_count)

    def _state_at(self, position: Position) -> dict[str, Any]:
        with self._changed:
            return {
                "kind": "stream",
                **asdict(replace(position, source=None)),
                "source": position.source,
                "done": sorted(self._done),
                "returned": [[row.epoch, row.index] for row in self._returned],
            }

    def load_state_dict(
        self, state: Mapping[str, Any], kept: Mapping[tuple[int, int], Row] | None = None
    ) -> None:
        """Continue from ``state``: the last item is read again, or all rows of the epoch so far.

        Args:
            state: what :meth:`state_dict` returned.
            kept: rows by (epoch, index), those given back among them.

        Raises:
            ConfigError: if the rows are others.
            RolloutError: if they cannot be read, or not in time.
        """
        if state.get("kind") != "stream":
            raise ConfigError(
                "the checkpoint was made with a sequence of prompts, now they are a stream: "
                f"positions would not mean the same rows. {RESTART}"
            )
        names = Position.__dataclass_fields__
        self._position = Position(**{name: state[name] for name in names})
        self._done = set(state["done"])
        places = [(int(epoch), int(index)) for epoch, index in state["returned"]]
        rows = kept or {}
        self._returned = deque(PromptRow(*p, rows[p]) for p in places if not self._is_beyond(p[0]))
        with self._changed:
            self._start()
            while not (self._is_placed or self._error):
                self._changed.wait(_POLL_S)
                if time.monotonic() - self._read_at > self._timeout_s:
                    raise RolloutError(
                        f"waited {self._timeout_s:.0f} s for a row of the prompts, to go on after "
                        f"row {self._position.index} of epoch {self._position.epoch}."
                    )
            if self._error and not self._is_placed:
                raise self._error

    # The reading thread --------------------------------------------------------------------------

    @property
    def _is_ready(self) -> bool:
        if not self._ahead:
            return self._error is not None
        return bool(self._num_extra) or not self._is_beyond(self._ahead[0][0].epoch)

    def _is_beyond(self, epoch: int) -> bool:
        return self._num_epochs is not None and epoch >= self._num_epochs

    def _start(self) -> None:
        if self._thread is None and not self._is_closed:
            self._read_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="sdp-prompts", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._read_all(self._position)
        except OtherRowsError as error:
            self._fail(error)
        except RolloutError as error:
            self._fail(error)
        except Exception as error:
            self._fail(RolloutError(f"reading the prompts {self._rows.name} failed: {error!r}"))

    def _fail(self, error: RolloutError | ConfigError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._on_ready()

    def _read_all(self, position: Position) -> None:
        placed = rows_after(self._rows, position, self._on_row_again)
        with self._changed:
            self._is_placed = True
            self._changed.notify_all()
        while self._may_begin(position.epoch):
            for row, position in placed:
                if not self._put(row, position):
                    return
            if position.index == 0:
                raise RolloutError(
                    f"the prompts {self._rows.name} gave no row in epoch {position.epoch}: a run "
                    "needs at least one, and a source that can be read once needs num_epochs=1."
                )
            position = Position(position.epoch + 1, count=position.count)
            placed = rows_of_epoch(self._rows, position)

    def _on_row_again(self) -> bool:
        """A row was read again on the way to a position. Returns whether to read on."""
        self._read_at = time.monotonic()
        return not self._is_closed

    def _put(self, data: Row, position: Position) -> bool:
        """Keep a row of this rank when there is room. Returns whether to read on."""
        number, index = position.count - 1, position.index - 1
        again = self._seen.fault_of(position.epoch, index, data) if self._drops else None
        with self._changed:
            self._read_at = time.monotonic()
            if number % self._num_ranks != self._rank or number in self._done:
                return not self._is_closed
        if not self._is_good(again or self._judge(index, data)):
            return not self._is_closed
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ahead) < READ_AHEAD)
            self._ahead.append((PromptRow(position.epoch, index, data), position))
            was_starved, self._is_starved = self._is_starved, False
            self._changed.notify_all()
            if self._is_closed:
                return False
        if was_starved:
            self._on_ready()
        return True

    def _is_good(self, fault: RowFault | None) -> bool:
        """Whether a row can be trained on. One that cannot is counted, or ends the run."""
        if fault is None:
            self._num_dropped_in_a_row = 0
            return True
        if not self._drops:
            raise RolloutError(
                f"the prompts {self._rows.name}: {fault.text} Correct it, leave it out, or set "
                "prompts_check='drop'."
            )
        self.num_dropped += 1
        if self.num_dropped in _SAID:
            text = "%d row(s) of the prompts %s are left out so far, the last one: %s"
            logger.warning(text, self.num_dropped, self._rows.name, fault.text)
        self._num_dropped_in_a_row += 1
        if self._num_dropped_in_a_row == MOST_DROPPED:
            raise RolloutError(
                f"the last {MOST_DROPPED} rows of the prompts {self._rows.name} were left out, the "
                f"last one because: {fault.text} A source that begins again by itself needs ids "
                "that differ, or no ids."
            )
        return False

    def _may_begin(self, epoch: int) -> bool:
        """Whether to read an epoch: one after the end is read when its rows are asked for."""
        if self._is_beyond(epoch) and not self._num_extra:
            with self._changed:
                self._is_at_end, self._is_starved = True, False
                self._changed.notify_all()
            self._on_ready()
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._num_extra or not self._is_beyond(epoch)
            )
            return not self._is_closed
