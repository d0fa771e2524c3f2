"""Dataset rows that a config names: files, Hugging Face datasets, reasoning-gym, Python objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from typing import Any, cast
from urllib.parse import parse_qsl

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError
from sdp_lightning.types import Row


def load_rows(source: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Dataset rows: as they are, or those that a string names, or that the named function returns.

    A string is ``"package.module:name"``, ``"path/to/file.py:name"``, or one of the forms of
    :func:`find_rows`: ``"rows.jsonl"``, ``"rows.parquet"``,
    ``"reasoning_gym:task?size=500"``, ``"datasets:name?split=train"``.

    Raises:
        ConfigError: if they have no length or no order: a generator, a single row, None.
    """
    found: object = source
    if isinstance(source, str):
        rows = find_rows(source)
        found = load_object(source) if rows is None else rows
        if callable(found):
            found = found()
    if not isinstance(found, Sized) or isinstance(found, (Mapping, str)):
        raise ConfigError(
            "prompts must be a sequence of rows, such as a list of mappings or a datasets.Dataset; "
            f"got {type(found).__name__}. Make a list of it."
        )
    return cast(Sequence[Mapping[str, Any]], found)


def find_rows(source: str) -> Sequence[Row] | None:
    """The rows that ``source`` names; None if it is not one of these forms.

    - ``path/to/file.jsonl`` or ``.parquet``; ``*`` stands for many files.
    - ``reasoning_gym:chain_sum?size=500&seed=1``: settings of the task follow the ``?``.
    - ``datasets:openai/gsm8k?name=main&split=train``: arguments of ``load_dataset`` follow it.

    Raises:
        ConfigError: if the rows are not there, or not rows.
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
    """``name?a=1&b=x`` as the name and its settings, of which JSON values are read as such.

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
