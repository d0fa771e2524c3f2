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

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import LoadFolder, Target, Weights

BUCKET_BYTES = 256 * 2**20
_PREFIX = "sdp-weights-"
_LOCK = "lock"
_UPDATE = "update-"


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
        self._number = 0  # number of the latest update
        self.path = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            self._lock_file: int | None = _make_locked(self.path)
        except OSError as error:
            raise EngineError(f"no folder for weights can be made in {parent}: {error}") from error

    def write(self, weights: Weights, *, full: bool) -> tuple[Path, int]:
        """Write ``weights``, a tied tensor once; returns the folder to load, and its bytes.

        At most ``bucket_bytes`` of them (or one tensor) are copied in this process at a time. An
        update without weights makes no folder.

        Raises:
            EngineError: if they cannot be written; what was written before is unchanged.
        """
        folder = self.path / ("base" if full else f"{_UPDATE}{self._number + 1}")
        part = self.path / "part"
        shutil.rmtree(part, ignore_errors=True)
        num_bytes = 0
        try:
            self._remove_updates()
            part.mkdir(mode=0o700)
            for number, bucket in enumerate(buckets(weights, self._bucket_bytes)):
                num_bytes += sum(tensor.nbytes for tensor in bucket.values())
                save_file(bucket, part / f"model-{number:05d}.safetensors")
                bucket.clear()  # before the next one is copied
            if full or num_bytes:
                self._replace(folder, part, full=full)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"{num_bytes} bytes of weights cannot be written to {self.path}: {error}. "
                f"{shutil.disk_usage(self.path.parent).free} bytes are free there."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if self._lock_file is None:  # closed meanwhile, maybe before the last file
                shutil.rmtree(self.path, ignore_errors=True)
        return folder, num_bytes

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
        self._latest: list[Path] = []

    def stage(self, weights: Weights, *, full: bool) -> int:
        folder, num_bytes = self._files.write(weights, full=full)
        self._latest = [folder] if num_bytes else []
        return num_bytes

    async def deliver(self, target: Target, *, whole: bool) -> None:
        for folder in self._files.folders if whole else readable(self._latest):
            await target.tell(LoadFolder(str(folder)))

    def close(self) -> None:
        self._files.close()


def buckets(weights: Weights, num_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Copy ``weights`` to the CPU in order, in buckets of at most ``num_bytes``, or one tensor.

    A tensor that the bucket already holds under another name is left out.
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
        bucket[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket


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
