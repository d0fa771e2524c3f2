"""Weights for other processes: safetensors files, in shared memory unless told otherwise.

Bounded: one full set, the two latest updates of it, and the part that is being written. A set
appears whole, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
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
    """``base/`` holds all weights of a start, ``update-7/`` what the 7th update brought.

    Loading ``base`` and then the latest update gives the present weights, because every update
    brings the same tensors. The update before it goes when the next one is written and not sooner,
    so what ``folders`` said can be read, in another thread or process, while one update comes: a
    server that comes back needs no pause of the trainer. At any time there are ``base``, at most
    two updates, of which one has gone while a part is written, and that part. A start replaces all.

    A lock on a file in it says that the owner lives, also across containers; the kernel lets go of
    it however the owner dies. Folders of this user that nobody has locked are removed when one is
    made; where a filesystem knows no locks, none are.

    Args:
        root: where; None is ``/dev/shm`` where there is one, else the temporary folder.
        bucket_bytes: of one file.
    """

    def __init__(self, root: Path | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        shared = Path("/dev/shm")
        parent = root or (shared if shared.is_dir() else Path(tempfile.gettempdir()))
        _remove_orphans(parent)
        self._bucket_bytes = bucket_bytes
        self._present: tuple[Path, ...] = ()
        self._replacing = threading.Lock()
        self._number = 0  # of the latest update
        self.path = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            self._lock_file: int | None = _make_locked(self.path)
        except OSError as error:
            raise EngineError(f"no folder for weights can be made in {parent}: {error}") from error

    def write(self, weights: Weights, *, full: bool) -> tuple[Path, int]:
        """Write ``weights``, a tied tensor once; returns the folder to load, and its bytes.

        No more than ``bucket_bytes`` of them (or one tensor) are copied in this process at a time.
        An update of nothing makes no folder.

        Raises:
            EngineError: if they cannot be written; what was written before is as it was.
        """
        folder = self.path / ("base" if full else f"{_UPDATE}{self._number + 1}")
        part = self.path / "part"
        shutil.rmtree(part, ignore_errors=True)
        num_bytes = 0
        try:
            self._remove_updates()
            part.mkdir()
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
            if self._lock_file is None:  # closed meanwhile, which may have missed what came last
                shutil.rmtree(self.path, ignore_errors=True)
        return folder, num_bytes

    @property
    def folders(self) -> list[Path]:
        """What to load, in order, for the present weights; for any thread.

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
        """All but the present one."""
        for update in self.path.glob(f"{_UPDATE}*"):
            if update not in self._present:
                shutil.rmtree(update, ignore_errors=True)

    def close(self) -> None:
        """Remove the files, also under a write in another thread. Safe to call twice."""
        lock_file, self._lock_file = self._lock_file, None
        shutil.rmtree(self.path, ignore_errors=True)
        if lock_file is not None:
            os.close(lock_file)


class FileTransport:
    """Servers load a :class:`WeightFolder`, which they must be able to see.

    Args:
        root: a folder that the servers see under the same name; None is this host's shared memory.
        bucket_bytes: of one file.
    """

    def __init__(self, root: Path | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._files = WeightFolder(root, bucket_bytes=bucket_bytes)
        self._latest: list[Path] = []

    @property
    def is_live(self) -> bool:
        return False

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
    """``weights`` on the CPU, in order, some at a time: at most ``num_bytes``, or one tensor.

    A tensor that a bucket holds under another name already is left out.
    """
    bucket: dict[str, Tensor] = {}
    held: dict[tuple[Any, ...], Tensor] = {}  # alive, so that no other tensor takes their place
    size = 0
    for name, tensor in weights:
        place = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
        if place in held:
            continue
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, held, size = {}, {}, 0
        held[place] = tensor
        bucket[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket


def readable(folders: Iterable[Path]) -> list[Path]:
    """``folders``, all of which are there.

    Raises:
        EngineError: naming the one that is not.
    """
    found = list(folders)
    for folder in found:
        try:
            os.listdir(folder)
        except OSError as error:
            raise EngineError(
                f"the weights of {folder} cannot be read: {error}. Something else has removed "
                "them, or their filesystem is gone; weight_folder puts them elsewhere."
            ) from error
    return found


def _make_locked(path: Path) -> int:
    """Make ``path``, never to be seen without its lock; returns the file that holds that."""
    hidden = path.with_name(f".{path.name}")
    hidden.mkdir()
    try:
        file = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        hidden.rmdir()
        raise
    with contextlib.suppress(OSError):  # where there are no locks, nobody else gets one either
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    hidden.rename(path)
    return file


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # What cannot be opened or locked has an owner, or none that could be told.
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    file = os.open(folder / _LOCK, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
