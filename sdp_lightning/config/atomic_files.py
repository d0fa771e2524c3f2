"""Files and folders that appear under their names complete, or not at all.

Each is written as a hidden sibling, ``.NAME.PID.part``, and renamed in one step. A process that is
killed leaves the sibling, and whatever had the name before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(target: Path, *, durable: bool = False) -> Generator[BinaryIO]:
    """A file to write, which replaces ``target`` if nothing is raised.

    Args:
        target: path of the file; its folder is made if it is missing.
        durable: wait until the disk has it, so that it outlives a loss of power.
    """
    part = _sibling(target, "part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        error.add_note(f"{target} was not written; if it was there before, it is untouched.")
        raise
    if durable:
        _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """An empty folder to fill, which replaces ``target`` if nothing is raised."""
    part, old = _sibling(target, "part"), _sibling(target, "old")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if target.is_dir() and any(target.iterdir()):
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of ``target``, which nobody may be writing now."""
    for part in target.parent.glob(f".{target.name}.*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _sibling(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{end}")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
