"""Rows of the library ``datasets``: from the Hugging Face hub, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.config.import_path import require
from sdp_lightning.errors import ConfigError


def load_hub_rows(name: str, settings: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows of ``datasets.load_dataset(name, **settings)``, read when they are used.

    Raises:
        ConfigError: if ``datasets`` is not installed, or ``settings`` select no single split.
    """
    require("datasets", "datasets", f"datasets:{name}")
    import datasets  # pyright: ignore[reportMissingImports]

    dataset: Any = datasets.load_dataset(name, **settings)
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise ConfigError(f"datasets:{name} has the splits {splits}: add ?split= and one of them.")
    return dataset
