"""Data that an earlier layout of the package wrote: see tests/data/before_the_rooms/README.md."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from support.paths import TESTS

OLD_DATA = TESTS / "data" / "before_the_rooms"
OLD_MODEL = str(OLD_DATA / "model")
OLD_RECORDING = OLD_DATA / "recording"


def expected_of_old_run() -> dict[str, Any]:
    """``trained_rows`` and ``metrics``, step by step."""
    return json.loads((OLD_DATA / "expected.json").read_text())


def unpack_old_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoint.ckpt"
    path.write_bytes(gzip.decompress((OLD_DATA / "checkpoint.ckpt.gz").read_bytes()))
    return path
