"""Finds the dataset rows that a config names: files, datasets, reasoning-gym, Python objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast
from urllib.parse import parse_qsl

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.iterable_rows import IterableRows, is_indexed
from sdp_lightning.types import Row

MOST_AT_ONCE = 100_000  # rows of an iterable that are read whole
NUM_CHECKED = 16  # rows of an iterable that are checked before the run
Prompts = str | Sequence[Mapping[str, Any]] | Iterable[Any] | Callable[[], Iterable[Any]]
Source = Prompts | IterableRows


def load_rows(source: Source) -> Sequence[Row] | IterableRows:
    """Dataset rows, given as such or by a string that names them.

    What has a length and an index is a sequence. Any other iterable is read one row after another:
    a generator, which can be read once, or a function that makes it, ``datasets`` streaming, a
    torch ``IterableDataset`` or ``DataLoader``.

    A string is the import path of rows, or of a function that returns them
    (``"package.module:name"``, ``"path/to/file.py:name"``), or one of the forms of
    :func:`find_rows`: ``"rows.jsonl"``, ``"rows.parquet"``, ``"reasoning_gym:task?size=500"``,
    ``"datasets:name?split=train"``.

    Raises:
        ConfigError: if they are no rows: a single row, a text, None.
    """
    rows: object = source
    if isinstance(source, str):
        rows = find_rows(source)
        if rows is None:
            rows = load_object(source)
    function: Any = None
    if callable(rows) and not isinstance(rows, Iterable | Sized):
        function, rows = rows, rows()
    if isinstance(rows, IterableRows):
        return rows
    if not isinstance(rows, Iterable | Sized) or isinstance(rows, (Mapping, str, bytes)):
        raise ConfigError(
            "prompts must be rows: a sequence, such as a list of mappings or a datasets.Dataset, "
            f"an iterable, or a function that returns one; got {type(rows).__name__}."
        )
    if is_indexed(rows):
        return cast(Sequence[Row], rows)
    is_made_again = function is not None and isinstance(rows, Iterator)
    source_of_rows: Any = function if is_made_again else rows
    return IterableRows(source_of_rows)


def name_of(rows: Source | None) -> str | None:
    """What a run's settings say of rows: their name, or how many of what kind."""
    if rows is None or isinstance(rows, str):
        return rows
    kind = type(rows).__name__
    return f"{len(rows)} rows ({kind})" if isinstance(rows, Sized) else kind


def read_rows(source: Source, count: int | None = None) -> Sequence[Row]:
    """Rows that are all needed at once, in order to evaluate: as :func:`load_rows`, or read.

    Args:
        source: rows, or their name.
        count: how many are enough of what is read one after another; None is all.

    Raises:
        ConfigError: if they are no rows, or more than 100,000 of what is read one after another.
    """
    rows = load_rows(source)
    if not isinstance(rows, IterableRows):
        return rows
    return rows.all(MOST_AT_ONCE) if count is None else rows.head(count)


def first_rows(rows: Sequence[Row] | IterableRows, count: int) -> list[Row]:
    """The first rows, at most ``count``; they are not used up."""
    if isinstance(rows, IterableRows):
        return rows.head(count)
    return [rows[index] for index in range(min(count, len(rows)))]


def find_rows(source: str) -> Sequence[Row] | None:
    """The rows that ``source`` names; None if it has none of these forms.

    - ``path/to/file.jsonl`` or ``.parquet``; a ``*`` matches many files.
    - ``reasoning_gym:chain_sum?size=500&seed=1``: settings of the task follow the ``?``.
    - ``datasets:openai/gsm8k?name=main&split=train``: arguments of ``load_dataset`` follow it.

    Raises:
        ConfigError: if the rows do not exist or cannot be read.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "reasoning_gym":
        from sdp_lightning.prompts.reasoning_gym import ReasoningGymRows

        name, settings = split_settings(rest)
        return ReasoningGymRows(name, **settings)
    if scheme == "datasets":
        from sdp_lightning.prompts.hub import load_hub_rows

        name, settings = split_settings(rest)
        return load_hub_rows(name, settings)
    if source.endswith((".jsonl", ".parquet")):
        from sdp_lightning.prompts.local_files import read_files

        return read_files(source)
    return None


def split_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Splits ``name?a=1&b=x`` into the name and its settings; JSON values are parsed.

    >>> split_settings("chain_sum?size=500&min_terms=2&mode=easy")
    ('chain_sum', {'size': 500, 'min_terms': 2, 'mode': 'easy'})

    Raises:
        ConfigError: if a setting has no value, or comes twice.
    """
    name, _, query = text.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"cannot read {query!r} in {text!r}: write name?a=1&b=2.") from error
    settings = {key: _value(value) for key, value in pairs}
    if len(settings) < len(pairs):
        raise ConfigError(f"a setting comes twice in {text!r}.")
    return name, settings


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
