"""Rows that can only be read one after another: generators, iterable datasets, data loaders.

No library is imported here: a torch DataLoader is known only where torch is in use already.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.types import Row

_END = object()


class IterableRows:
    """An iterable of rows, or of batches of rows, that is read from its start in every epoch.

    Its ``set_epoch(epoch)``, or that of its ``dataset`` or ``sampler``, is called first, if there
    is one. A batch is a list of rows or, from a DataLoader, a mapping of columns.

    Args:
        source: an iterable, or a function without arguments that returns a new iterator each time.

    Raises:
        ConfigError: if it is a generator that was begun already, or a DataLoader whose order cannot
            be had again.
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        self._source: Any = source
        self.is_one_shot, self._is_read = isinstance(source, Iterator), False
        # foreign: a function or an object of the user's
        self.name = str(getattr(source, "__name__", type(source).__name__))
        if inspect.isgenerator(source) and inspect.getgeneratorstate(source) != inspect.GEN_CREATED:
            raise ConfigError(
                f"the generator {self.name} of the prompts was read from already: give the "
                "function that makes it, which is called for every epoch."
            )
        self._start: Any = None  # the source's state before its first row, once it was read
        self._gives_batches, self.shuffles = _loader_traits(source)
        if self.shuffles and not _has_state(source):
            raise ConfigError(
                "the DataLoader of the prompts shuffles, in another order in every process: give "
                "its dataset itself, whose rows RolloutConfig(shuffle=True, seed=...) shuffles."
            )

    def open(self, epoch: int, state: Any = None) -> Iterator[tuple[Any, list[Row]]]:
        """The items of an epoch, each with the state before it, from ``state`` on.

        Args:
            epoch: number of the epoch.
            state: what the source's ``state_dict`` returned; None is its start.

        Returns:
            Pairs of the state before an item, None if the source has none or is at its start, and
            the rows of the item.

        Raises:
            RolloutError: if an item is neither a row nor a batch of rows, or a source that can be
                read once was read already.
        """
        if self.is_one_shot and self._is_read:
            raise RolloutError(
                f"the prompts {self.name!r} were read already, and can be read once: give the "
                "function that makes it."
            )
        self._is_read = True
        yield from self._items(epoch, state)

    def _items(self, epoch: int, state: Any = None) -> Generator[tuple[Any, list[Row]]]:
        # foreign: a function is called for every epoch
        source: Any = self._source if hasattr(self._source, "__iter__") else self._source()
        _set_epoch(source, epoch)
        if state is not None:
            source.load_state_dict(state)
        iterator, has_state = iter(source), _has_state(source)
        while (item := next(iterator, _END)) is not _END:
            yield state, rows_of(item, of_loader=self._gives_batches)
            state = copy.deepcopy(source.state_dict()) if has_state else None

    @property
    def start(self) -> Any:
        """The state before the first row, with which the source forgets another; None without."""
        if self._start is None and _has_state(self._source):
            self._start = copy.deepcopy(self._source.state_dict())
        return self._start

    def head(self, count: int) -> list[Row]:
        """The first rows, at most ``count``. They are read again by :meth:`open`."""
        start, items, rows = self.start, self._items(0), list[Row]()
        for _, part in items:
            rows += part
            if len(rows) >= count:
                break
        if start is not None:
            items.close()
            self._source.load_state_dict(copy.deepcopy(start))
        elif self.is_one_shot:
            self._source = itertools.chain([rows], (part for _, part in items))
        return rows[:count]

    def all(self, most: int) -> list[Row]:
        """All rows of one epoch.

        Raises:
            ConfigError: if there are more than ``most``.
        """
        rows = self.head(most + 1)
        if len(rows) > most:
            raise ConfigError(
                f"{self.name} has more than {most} rows, and they are all rolled out at once: take "
                "a part of them."
            )
        return rows


def is_indexed(rows: object) -> bool:
    """Whether ``rows`` have a length and are read by index."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(rows, torch.utils.data.IterableDataset):
        return False  # it may have a length, and has an index that raises
    # foreign: any object
    return isinstance(rows, Sized) and hasattr(type(rows), "__getitem__")


def rows_of(item: Any, *, of_loader: bool) -> list[Row]:
    """The rows of an item: itself, or those of a batch.

    Args:
        item: a mapping, or a list of mappings.
        of_loader: whether a mapping of columns is a batch: lists of plain values, and arrays.

    Raises:
        RolloutError: if it is neither.
    """
    if isinstance(item, list | tuple):
        rows = cast(Sequence[object], item)
    elif of_loader and isinstance(item, Mapping):
        rows = _rows_of_columns(cast(Mapping[str, Any], item))
    else:
        rows = [item]
    for row in rows:
        if not isinstance(row, Mapping):
            raise RolloutError(f"the prompts give a {type(row).__name__}; rows must be mappings.")
    return cast(list[Row], list(rows))


def _rows_of_columns(columns: Mapping[str, Any]) -> list[Row]:
    values = {name: _column(column) for name, column in columns.items()}
    sizes = {None if column is None else len(column) for column in values.values()}
    if len(sizes) != 1 or None in sizes:
        raise RolloutError(
            f"a batch of the DataLoader has the columns {', '.join(map(repr, columns))}, which do "
            "not fall into rows: make it with collate_fn=list, or with batch_size=None."
        )
    names = list(values)
    return [dict(zip(names, row, strict=True)) for row in zip(*values.values(), strict=True)]  # type: ignore[arg-type]


def _column(column: Any) -> Sequence[Any] | None:
    """The values of a column; None if they are no plain ones, which a collation may have turned."""
    if isinstance(column, list | tuple):
        plain = cast(Sequence[Any], column)
        known = str | int | float | bool | bytes | None
        return plain if all(isinstance(value, known) for value in plain) else None
    # foreign: a tensor or an array
    if getattr(column, "ndim", 0) < 1:
        return None
    values: list[Any] = list(column)
    return [value.item() if np.ndim(value) == 0 else value for value in values]


def _loader_traits(source: Any) -> tuple[bool, bool]:
    """Whether ``source`` is a DataLoader that gives batches, and whether that shuffles."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.utils.data.DataLoader):
        return False, False
    loader: Any = source
    shuffles = isinstance(loader.sampler, torch.utils.data.RandomSampler)
    return loader.batch_sampler is not None or loader.batch_size is not None, shuffles


def _has_state(source: object) -> bool:
    # foreign: iterable datasets have these two by convention
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def _set_epoch(source: Any, epoch: int) -> None:
    # foreign: datasets and samplers have it by convention, loaders have a dataset and a sampler
    owners = [source, *(getattr(source, name, None) for name in ("dataset", "sampler"))]
    for owner in owners:
        # foreign: see above
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)
