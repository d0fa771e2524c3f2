"""Checkpoints that are written whole or not at all, and checked when they are loaded.

Lightning writes a file in the temporary folder and moves it. Where that is another file system the
move is a copy, and a kill in the middle leaves half a checkpoint under the name of a whole one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sdp_lightning.config.atomic_files import atomic_file, remove_leftovers
from sdp_lightning.errors import CheckpointError


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, then puts the file in its place in one step.

    A process that is killed leaves the checkpoint that was there before, and a hidden file
    ``.NAME.PID.part``, which the next save under that name removes. Paths with a protocol
    (``s3://``) are left to Lightning's own way.
    """

    def __init__(self) -> None:
        self._plain = TorchCheckpointIO()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or _is_remote(path):
            self._plain.save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        remove_leftovers(target)
        with atomic_file(target, durable=True) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, to the CPU unless ``map_location`` says otherwise.

        The file is read twice: torch does not verify its checksums.

        Raises:
            CheckpointError: if the file is incomplete or damaged; it names the newest good one.
            FileNotFoundError: if there is no such file.
        """
        file = Path(path)
        if not _is_remote(path) and file.exists() and not _is_whole(file):
            raise CheckpointError(_why_not(file))
        target = _to_cpu if map_location is None else map_location
        return self._plain.load_checkpoint(path, target, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        self._plain.remove_checkpoint(path)


def use_atomic_checkpoints(trainer: L.Trainer) -> None:
    """Give the trainer an :class:`AtomicCheckpointIO`, unless the user chose another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _why_not(path: Path) -> str:
    if (path / "meta.pt").is_file():
        return (
            f"the checkpoint {str(path)!r} is a folder of shards, which only ModelParallelStrategy "
            "can go on from, on any number of devices: use it again, or begin anew from what "
            "`sdp-lightning export` makes of the folder."
        )
    beside = sorted(path.parent.glob("*.ckpt"), key=lambda found: -found.stat().st_mtime)
    whole = next((found for found in beside if found != path and _is_whole(found)), None)
    kind = "is a folder, but no sharded checkpoint" if path.is_dir() else "is torn or damaged"
    remedy = "There is no whole one beside it." if whole is None else f"Use {str(whole)!r}."
    return f"cannot load the checkpoint {str(path)!r}: it {kind}. {remedy}"


def _is_whole(path: Path) -> bool:
    """Whether the archive that torch wrote is complete and its checksums are right."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _to_cpu(storage: Any, location: str) -> Any:
    return storage


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
