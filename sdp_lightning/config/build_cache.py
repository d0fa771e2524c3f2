"""The package's folder of files, and folders in it that are built once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sdp_lightning.config.atomic_files import atomic_folder, remove_leftovers


def cache_folder() -> Path:
    """The package's cache folder: ``$XDG_CACHE_HOME/sdp_lightning``, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdp_lightning"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``name`` (or ``folder/name``) in the cache; ``build`` fills it if it is not there.

    A folder with its final name is always complete. Of several processes that call this at the same
    time one builds and the others wait; what an interrupted build left is thrown away.
    """
    from filelock import FileLock

    target = cache_folder() / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                remove_leftovers(target)
                with atomic_folder(target) as work:
                    build(work)
    return target
