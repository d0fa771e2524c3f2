"""The path by which another process imports a reward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError


def import_path_of(reward: str | Callable[..., Any]) -> str:
    """Path by which another process imports ``reward``, for ``load_object``.

    Raises:
        ConfigError: if it is no function, or cannot be imported: a lambda, a closure, a method, a
            function of a notebook or of the script that runs.
    """
    spec = reward if isinstance(reward, str) else _spec_of(reward)
    loaded = load_object(spec)
    if not callable(loaded) or not (isinstance(reward, str) or loaded is reward):
        raise ConfigError(_not_importable(reward))
    file, _, name = spec.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{name}" if file.endswith(".py") else spec


def _spec_of(reward: Callable[..., Any]) -> str:
    # foreign: a callable may have no name
    module = sys.modules.get(str(getattr(reward, "__module__", None)))
    # foreign: a callable may have no name
    name = str(getattr(reward, "__qualname__", "<"))
    if module is None or module.__name__ == "__main__" or "<" in name:
        raise ConfigError(_not_importable(reward))
    if module.__name__.startswith("_sdp_file_"):  # a file that load_object loaded
        return f"{module.__file__}:{name}"
    return f"{module.__name__}:{name}"


def _not_importable(reward: object) -> str:
    return (
        f"worker processes cannot import {reward!r}. Put the function at the top level of a file, "
        "and pass its path: reward='path/to/file.py:name'."
    )
