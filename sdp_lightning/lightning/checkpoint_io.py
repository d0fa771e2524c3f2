"""Checkpoints that are written whole or not at all, and checked when they are loaded.

Lightning writes a file in the temporary folder and moves it. Where that is another file system the
move is a copy, and a kill in the middle leaves half a checkpoint under the name of a whole one.
"""

from __future__ import annotations

import errno
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sdp_lightning.config.atomic_files import atomic_file, remove_leftovers
from sdp_lightning.errors import CheckpointError, error_text
from sdp_lightning.lightning.checkpoint_digest import (
    DigestWriter,
    newest_whole_beside,
    remedy_beside,
    require_whole,
)

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of this user is used up"}


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, with a digest, then puts the file in its place in one step.

    A process that is killed leaves the checkpoint that was there before, and a hidden file
    ``.NAME.PID.part``, which the next save under that name removes. Paths with a protocol
    (``s3://``) are left to Lightning's own way.
    """

    def __init__(self) -> None:
        self._plain = TorchCheckpointIO()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``, whose digest is in the file.

        Raises:
            CheckpointError: if the disk does not take it; says how many bytes it needs and how many
                are free. What was there before is untouched.
        """
        if storage_options is not None or _is_remote(path):
            self._plain.save_checkpoint(checkpoint, path, storage_options)
            return
        target, num_bytes = Path(path), 0
        try:
            remove_leftovers(target)
            with atomic_file(target, durable=True) as file:
                with DigestWriter(file) as writer:
                    torch.save(checkpoint, cast(Any, writer))
                num_bytes = writer.num_bytes
                writer.finish()
        except OSError as error:
            raise CheckpointError(_why_not_written(target, num_bytes, error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, to the CPU unless ``map_location`` says otherwise.

        The file is read twice: before torch reads it, all of it is compared with its digest.

        Raises:
            CheckpointError: if the file is torn or damaged, or cannot be loaded for any other
                reason; says why, and names the newest whole one beside it.
            FileNotFoundError: if there is no such file.
        """
        file = Path(path)
        if not _is_remote(path) and file.exists():
            _refuse_folder(file)
            require_whole(file)
        target = _to_cpu if map_location is None else map_location
        try:
            return self._plain.load_checkpoint(path, target, weights_only)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no checkpoint {str(path)!r}. {_instead(file)}"
            ) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"cannot load the checkpoint {str(path)!r}, which is whole: {error}"
            ) from error
        except Exception as error:  # whatever torch raises
            raise CheckpointError(
                f"cannot load the checkpoint {str(path)!r}: {error_text(error)}. "
                f"{remedy_beside(file)}"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        self._plain.remove_checkpoint(path)


def use_atomic_checkpoints(trainer: L.Trainer) -> None:
    """Give the trainer an :class:`AtomicCheckpointIO`, unless the user chose another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _instead(path: Path) -> str:
    """What to pass in place of a checkpoint that is not there."""
    if re.fullmatch("registry(:.*)?", str(path).lower()):  # and Lightning did not look into it
        return "For Lightning's model registry, `pip install litmodels`; a file needs another name."
    beside = newest_whole_beside(path)
    chosen = "Pass the path of one" if beside is None else f"Pass {str(beside)!r}"
    return f"{chosen}, or ckpt_path='last' for the newest of the run."


def _refuse_folder(path: Path) -> None:
    if not path.is_dir():
        return
    if (path / "meta.pt").is_file():
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is a folder of shards, which only ModelParallelStrategy "
            "can go on from, on any number of devices: use it again, or begin anew from what "
            "`sdp-lightning export` makes of the folder."
        )
    raise CheckpointError(
        f"cannot load the checkpoint {str(path)!r}: it is a folder, but no sharded checkpoint. "
        f"{remedy_beside(path)}"
    )


def _why_not_written(target: Path, num_bytes: int, error: OSError) -> str:
    reason = _FULL.get(error.errno or 0) or str(error)
    room = ""
    if num_bytes and target.parent.is_dir():
        free = shutil.disk_usage(target.parent).free
        room = f" It needs {num_bytes:,} bytes, and the disk has {free:,} free."
    return (
        f"the checkpoint {str(target)!r} was not written: {reason}.{room} If it was there before, "
        "it is untouched. Make room, keep fewer checkpoints (ModelCheckpoint(save_top_k=...)), or "
        "save on another disk."
    )


def _to_cpu(storage: Any, location: str) -> Any:
    return storage


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
