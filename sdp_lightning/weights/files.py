"""Weights for another process on the same host: safetensors files in shared memory.

Bounded: one full set, and the tensors that have changed since. Each file appears whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.errors import EngineError

_PREFIX = "sdp-weights-"


class WeightFolder:
    """``base/`` holds all weights of a start, ``update/`` what the latest update brought.

    Loading ``base`` and then ``update`` gives the present weights, because every update brings the
    same tensors. Folders of processes that no longer run are removed when one is made.

    Args:
        root: where; None is ``/dev/shm`` where there is one, else the temporary folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        shared = Path("/dev/shm")
        parent = root or (shared if shared.is_dir() else Path(tempfile.gettempdir()))
        _remove_orphans(parent)
        self.path = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.path.mkdir()

    def write(self, weights: Iterable[tuple[str, Tensor]], *, full: bool) -> tuple[Path, int]:
        """Write ``weights``, a tied tensor once; returns the folder to load, and its bytes.

        Raises:
            EngineError: if they cannot be written; what was written before is as it was.
        """
        unique: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        for name, tensor in weights:
            place = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
            unique.setdefault(place, (name, tensor))
        tensors = {name: t.detach().cpu().contiguous() for name, t in unique.values()}
        num_bytes = sum(t.nbytes for t in tensors.values())
        folder = self.path / ("base" if full else "update")
        part = self.path / "part"
        try:
            if tensors:
                save_file(tensors, part)
            if full:
                shutil.rmtree(self.path / "update", ignore_errors=True)
            folder.mkdir(exist_ok=True)
            if tensors:
                part.rename(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise EngineError(
                f"{num_bytes} bytes of weights cannot be written to {self.path}: {error}. "
                f"{_free_bytes(self.path)} bytes are free there."
            ) from error
        return folder, num_bytes

    @property
    def folders(self) -> list[Path]:
        """What to load, in order, for the present weights."""
        found = [self.path / "base", self.path / "update"]
        return [folder for folder in found if (folder / "model.safetensors").exists()]

    def close(self) -> None:
        """Remove the files. Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path if path.exists() else path.parent).free


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
