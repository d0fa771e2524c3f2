"""The order of prompts, fixed by (seed, epoch), and the position in it.

Not thread-safe: its owner locks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.fingerprint import fingerprint
from sdp_lightning.types import Row

logger = logging.getLogger(__name__)

RESTART = (
    "Resume with the prompts of the checkpoint, or begin these from their start and keep weights, "
    "optimizer and version: prompts_on_resume='restart' in the RolloutConfig."
)
EVALUATION_EPOCH = 2**31  # epoch of rows that are only judged


@dataclass(frozen=True, eq=False)
class PromptRow:
    """A dataset row in an epoch; (epoch, index) identifies it and seeds its tokens.

    Attributes:
        row_id: the row's ``"id"``, else its index in the dataset.
    """

    epoch: int
    index: int
    data: Row

    @property
    def row_id(self) -> str:
        return str(self.data.get("id", self.index))

    @property
    def is_evaluation(self) -> bool:
        """Whether the row is only judged, and never trained on."""
        return self.epoch == EVALUATION_EPOCH


class PromptStream:
    """Cycles through the rows, reshuffled in every epoch, for ``num_epochs``; None is no end.

    Rows that were given back come first, in that order. Each of several ranks takes every
    ``num_ranks``-th position, across the ends of epochs: no row twice, and none left out.

    Raises:
        ConfigError: if there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if len(rows) == 0:
            raise ConfigError("prompts is empty: a run needs at least one row.")
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self._num_epochs, self._num_ranks = num_epochs, num_ranks
        self._epoch, self._position = divmod(rank, len(rows))
        self._order = self._order_of(self._epoch)
        self._returned: deque[tuple[int, int]] = deque()
        self._num_extra = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether no row is left, unless one is given back or asked for beyond the end."""
        return (
            not self._returned
            and not self._num_extra
            and self._num_epochs is not None
            and (self._epoch >= self._num_epochs)
        )

    @property
    def awaited_s(self) -> float | None:
        """Seconds for which a row has been awaited: None, as it is read when it is asked for."""
        return None

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Does nothing: a row is always ready."""

    def close(self) -> None:
        """Does nothing."""

    def next(self, wait_s: float = 0.0) -> PromptRow | None:
        """The next row, or None when exhausted; it never waits.

        Raises:
            RolloutError: naming the row that could not be read; the position does not move.
        """
        if self.is_exhausted:
            return None
        epoch, index = self._returned[0] if self._returned else self._current()
        row = self.read(epoch, index)
        if self._returned:
            self._returned.popleft()
        else:
            if self._num_epochs is not None and epoch >= self._num_epochs:
                self._num_extra -= 1
            self._advance()
        return row

    def read(self, epoch: int, index: int) -> PromptRow:
        """Row ``index`` in ``epoch``; the position does not move.

        Raises:
            RolloutError: naming the row, if it could not be read.
        """
        try:
            data = self._rows[index]
        except Exception as error:
            raise RolloutError(f"reading row {index} of the prompts failed: {error!r}") from error
        if not isinstance(data, Mapping):
            raise RolloutError(
                f"row {index} of the prompts is {type(data).__name__}; rows must be mappings."
            )
        return PromptRow(epoch, index, data)

    def extend(self, count: int) -> None:
        """Go on for ``count`` rows of the epochs after the last one."""
        self._num_extra += count

    def give_back(self, row: PromptRow) -> None:
        """Hand ``row`` out again, before any new row."""
        self._returned.append((row.epoch, row.index))

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the rows' content; None, with a warning, if they cannot all be read now."""
        try:
            return fingerprint(self._rows)
        except RolloutError as error:
            logger.warning("checkpoints of this run cannot tell its prompts from others: %s", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        """The position, the rows given back and the fingerprint, in plain types."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_rows": len(self._rows),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self.fingerprint,
            "returned": [list(pair) for pair in self._returned],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], kept: Mapping[tuple[int, int], Row] | None = None
    ) -> None:
        """Continue from ``state``; ``kept`` are rows that are read again here.

        Raises:
            ConfigError: if the rows or their order differ.
        """
        if "num_rows" not in state:
            raise ConfigError(
                "the checkpoint was made with a stream of prompts, now they are a sequence: "
                f"positions would not mean the same rows. {RESTART}"
            )
        if (state["seed"], state["shuffle"]) != (self._seed, self._shuffle):
            raise ConfigError(
                f"the checkpoint was made with seed={state['seed']} and shuffle="
                f"{state['shuffle']}, now they are {self._seed} and {self._shuffle}: positions "
                f"would not mean the same rows. {RESTART}"
            )
        if state["num_rows"] != len(self._rows):
            raise ConfigError(
                f"the checkpoint was made with {state['num_rows']} prompts, now there are "
                f"{len(self._rows)}: positions would not mean the same rows. {RESTART}"
            )
        saved = state.get("fingerprint")
        if saved is None:
            logger.warning(
                "the checkpoint has no fingerprint of its %d prompts: it is not known whether "
                "these are the same.",
                len(self._rows),
            )
        elif self.fingerprint is not None and saved != self.fingerprint:
            raise ConfigError(
                f"the checkpoint was made with {len(self._rows)} other prompts (fingerprint "
                f"{saved[:8]}, now {self.fingerprint[:8]}): positions would not mean the same "
                f"rows. {RESTART}"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)
        last = self._num_epochs
        returned = ((int(epoch), int(index)) for epoch, index in state["returned"])
        self._returned = deque(row for row in returned if last is None or row[0] < last)

    def _current(self) -> tuple[int, int]:
        return self._epoch, self._order[self._position]

    def _advance(self) -> None:
        epochs, self._position = divmod(self._position + self._num_ranks, len(self._rows))
        if epochs:
            self._epoch += epochs
            self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        return row_order(len(self._rows), epoch, seed=self._seed, shuffle=self._shuffle)


def row_order(num_rows: int, epoch: int, *, seed: int, shuffle: bool) -> list[int]:
    """Indices of the rows of an epoch, in order."""
    if not shuffle:
        return list(range(num_rows))
    return [int(index) for index in np.random.default_rng([seed, epoch]).permutation(num_rows)]


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers of 0 or more."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)
