"""From a name to rows, and how names are written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from sdp_lightning.errors import ConfigError

Row = Mapping[str, Any]


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
        from sdp_lightning.rows.reasoning import ReasoningGymRows

        name, settings = split_settings(rest)
        return ReasoningGymRows(name, **settings)
    if scheme == "datasets":
        from sdp_lightning.rows.hub import load_hub_rows

        name, settings = split_settings(rest)
        return load_hub_rows(name, settings)
    if source.endswith((".jsonl", ".parquet")):
        from sdp_lightning.rows.files import read_files

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


def require(module: str, package: str, use: str) -> None:
    """Raise ``ConfigError`` with pip's command if ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{use} needs {package}, which is not installed: pip install {package}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
