"""Rows of the library ``datasets``: from the Hugging Face hub, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import ConfigError


def load_hub_rows(name: str, settings: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """``datasets.load_dataset(name, **settings)``, of which one split must be left.

    Rows are read as they are used.

    Raises:
        ConfigError: if ``datasets`` is not installed, or no split is named.
    """
    require("datasets", "datasets", f"datasets:{name}")
    import datasets  # pyright: ignore[reportMissingImports]

    found: Any = datasets.load_dataset(name, **settings)
    if isinstance(found, Mapping):
        splits = ", ".join(map(str, found))
        raise ConfigError(f"datasets:{name} has the splits {splits}: add ?split= and one of them.")
    return found
