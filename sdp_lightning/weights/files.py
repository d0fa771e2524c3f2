"""Weights for other processes: safetensors files, by default in shared memory.

The space is bounded: one full set, its two latest updates, and the folder that is being written. A
folder appears complete, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import LoadFolder, ServedType, Target, Weights

BUCKET_BYTES = 256 * 2**20
_PREFIX = "sdp-weights-"
_LOCK = "lock"
_UPDATE = "update-"
_TYPES: dict[ServedType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class WeightFolder:
    """Weights in folders: ``base/`` has all weights of a start, ``update-7/`` those of update 7.

    Loading ``base`` and then the latest update gives the present weights, because every update
    has the same tensors. The previous update is removed only when the next one is written, so
    another thread or process can read the paths in ``folders`` during one update: a server that
    comes back needs no pause of the trainer. A start replaces everything.

    Folders and files are for this user only, and servers must run as the same. A file lock shows
    that the owner lives, also across containers; the kernel releases it however the owner dies.
    Making a folder removes those of this user that nobody has locked; on a filesystem without
    locks, none.

    Args:
        root: parent folder; None is ``/dev/shm`` if it exists, else the temporary folder.
        bucket_bytes: size of one file, and of the copy of weights that is made at a time.
    """

    def __init__(self, root: Path | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        shared = Path("/dev/shm")
        parent = root or (shared if shared.is_dir() else Path(tempfile.gettempdir()))
        _remove_orphans(parent)
        self._bucket_bytes = bucket_bytes
        self._present: tuple[Path, ...] = ()
        self._replacing = threading.Lock()
        self._staged: tuple[Path, bool] | None = None  # its folder once in force; is it full?
        self._number = 0  # number of the latest update
        self.path = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            self._lock_file: int | None = _make_locked(self.path)
        except OSError as error:
            raise EngineError(f"no folder for weights can be made in {parent}: {error}") from error

    def stage(
        self, weights: Weights, *, full: bool, dtype: ServedType | None = None
    ) -> tuple[Path, int]:
        """Write ``weights``, a tied tensor once; ``activate`` puts them in force.

        At most ``bucket_bytes`` of them (or one tensor) are copied in this process at a time. An
        update without weights makes no folder.

        Returns:
            The folder to load once they are in force, and its bytes.

        Raises:
            EngineError: if they cannot be written; what is in force is unchanged.
        """
        folder = self.path / ("base" if full else f"{_UPDATE}{self._number + 1}")
        part = self.path / "part"
        shutil.rmtree(part, ignore_errors=True)
        self._staged, num_bytes, is_written = None, 0, False
        try:
            self._remove_updates()
            part.mkdir(mode=0o700)
            for number, bucket in enumerate(buckets(weights, self._bucket_bytes, dtype)):
                num_bytes += sum(tensor.nbytes for tensor in bucket.values())
                save_file(bucket, part / f"model-{number:05d}.safetensors")
                bucket.clear()  # before the next one is copied
            is_written = full or num_bytes > 0
        except (OSError, SafetensorError) as error:
            raise self._unwritable(num_bytes, error) from error
        finally:
            if not is_written:
                shutil.rmtree(part, ignore_errors=True)
            self._remove_if_closed()
        self._staged = (folder, full) if is_written else None
        return folder, num_bytes

    def activate(self) -> None:
        """Put in force what was staged last.

        Raises:
            EngineError: if its files are gone.
        """
        staged, self._staged = self._staged, None
        if staged is not None:
            try:
                self._replace(staged[0], self.path / "part", full=staged[1])
            except OSError as error:
                raise self._unwritable(0, error) from error
            finally:
                self._remove_if_closed()

    def write(self, weights: Weights, *, full: bool) -> tuple[Path, int]:
        """Stage ``weights`` and put them in force; what ``stage`` returns and raises."""
        written = self.stage(weights, full=full)
        self.activate()
        return written

    def _remove_if_closed(self) -> None:
        """Remove what came after a ``close`` in another thread, maybe with the last file."""
        if self._lock_file is None:
            shutil.rmtree(self.path, ignore_errors=True)

    def _unwritable(self, num_bytes: int, error: Exception) -> EngineError:
        with contextlib.suppress(OSError):
            free = f" {shutil.disk_usage(self.path.parent).free} bytes are free there."
            return EngineError(
                f"{num_bytes} bytes of weights cannot be written to {self.path}: {error}.{free}"
            )
        return EngineError(f"weights cannot be written to {self.path}: {error}.")

    @property
    def folders(self) -> list[Path]:
        """Folders to load, in order, for the present weights; for any thread.

        Raises:
            EngineError: if they cannot be read any more.
        """
        with self._replacing:
            return readable(self._present)

    def _replace(self, folder: Path, part: Path, *, full: bool) -> None:
        with self._replacing:
            if full:
                self._present = ()
                shutil.rmtree(folder, ignore_errors=True)
            is_empty = not any(part.iterdir())
            part.rename(folder)
            if full:
                self._present = () if is_empty else (folder,)
                self._remove_updates()
            else:
                self._number += 1
                self._present = (*(x for x in self._present if x.name == "base"), folder)

    def _remove_updates(self) -> None:
        """Remove all updates but the present one."""
        for update in self.path.glob(f"{_UPDATE}*"):
            if update not in self._present:
                shutil.rmtree(update, ignore_errors=True)

    def close(self) -> None:
        """Remove the files, even during a write in another thread. Safe to call twice."""
        lock_file, self._lock_file = self._lock_file, None
        shutil.rmtree(self.path, ignore_errors=True)
        if lock_file is not None:
            os.close(lock_file)


class FileTransport:
    """Servers load the files of a :class:`WeightFolder`, which they must be able to see.

    Args:
        root: a folder that the servers see under the same name; None is this host's shared memory.
        bucket_bytes: size of one file.
    """

    is_live = False

    def __init__(self, root: Path | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._files = WeightFolder(root, bucket_bytes=bucket_bytes)
        self._staged: list[Path] = []
        self._latest: list[Path] = []

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        folder, num_bytes = self._files.stage(weights, full=full, dtype=dtype)
        self._staged = [folder] if num_bytes else []
        return num_bytes

    def activate(self) -> None:
        self._files.activate()
        self._latest = self._staged

    async def deliver(self, target: Target, *, whole: bool) -> None:
        for folder in self._files.folders if whole else readable(self._latest):
            await target.tell(LoadFolder(str(folder)))

    def close(self) -> None:
        self._files.close()


def buckets(
    weights: Weights, num_bytes: int, dtype: ServedType | None = None
) -> Iterator[dict[str, Tensor]]:
    """Copy ``weights`` to the CPU in order, in buckets of at most ``num_bytes``, or one tensor.

    A tensor that the bucket already holds under another name is left out. Floating-point ones are
    rounded to ``dtype`` where it is smaller, as a server of that type does when it loads them.
    """
    bucket: dict[str, Tensor] = {}
    held: dict[tuple[Any, ...], Tensor] = {}  # alive, so that no other tensor reuses its memory
    size = 0
    for name, tensor in weights:
        storage = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
        if storage in held:
            continue
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, held, size = {}, {}, 0
        held[storage] = tensor
        bucket[name] = rounded(tensor.detach(), dtype).cpu().contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket


def rounded(tensor: Tensor, dtype: ServedType | None) -> Tensor:
    """``tensor`` in ``dtype``, if it holds floats and they take less room in it."""
    served = None if dtype is None else _TYPES[dtype]
    if served is None or not tensor.is_floating_point() or served.itemsize >= tensor.itemsize:
        return tensor
    return tensor.to(served)


def readable(folders: Iterable[Path]) -> list[Path]:
    """Check that all ``folders`` can be read; returns them.

    Raises:
        EngineError: naming a folder that cannot.
    """
    paths = list(folders)
    for folder in paths:
        try:
            os.listdir(folder)
        except OSError as error:
            raise EngineError(
                f"the weights of {folder} cannot be read: {error}. Something else has removed "
                "them, or their filesystem is gone; weight_folder puts them elsewhere."
            ) from error
    return paths


def _make_locked(path: Path) -> int:
    """Make folder ``path``, which appears with its lock; returns the locked file descriptor."""
    hidden = path.with_name(f".{path.name}")
    hidden.mkdir(mode=0o700)
    try:
        file = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError:
        hidden.rmdir()
        raise
    with contextlib.suppress(OSError):  # without file locks, nobody else gets one either
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    hidden.rename(path)
    return file


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # A folder that cannot be opened or locked has an owner, or an unknown one.
        with contextlib.suppress(OSError):
            # Others may have put a link here, to a folder of this user that is none of weights.
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
