"""Rows of local files: JSONL, with one object on each line, and Parquet."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import ConfigError


def read_files(pattern: str) -> list[dict[str, Any]]:
    """All rows of the files, in the order of their names; ``pattern`` may hold a glob's ``*``.

    A row without an ``"id"`` gets one from its position, which errors of a rollout name:
    ``train.jsonl:7`` is its line, and ``train.parquet[6]`` its index.

    Raises:
        ConfigError: if there is no file or no row, or a line is not a row.
    """
    path = Path(pattern).expanduser()
    files = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(pattern) else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ConfigError(f"there is no file {pattern!r} (looked for {path.absolute()}).")
    read = _read_jsonl if pattern.endswith(".jsonl") else _read_parquet
    rows = [row for file in files for row in read(file)]
    if not rows:
        raise ConfigError(f"{pattern} is empty: a run needs at least one row.")
    return rows


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line.decode())
        except ValueError as error:  # of JSON, or of UTF-8
            raise ConfigError(f"{file}, line {number}, is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{file}, line {number}, is {type(row).__name__}; each line must be an object such "
                'as {"prompt": "1+1=", "answer": "2"}.'
            )
        yield {"id": f"{file.name}:{number}", **row}


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    require("pyarrow", "pyarrow", f"reading {file.name}")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet: {error}.") from error
    for index, row in enumerate(table.to_pylist()):
        yield {"id": f"{file.name}[{index}]", **row}
