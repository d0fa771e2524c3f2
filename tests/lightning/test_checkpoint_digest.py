"""A checkpoint is proved whole before it is believed, and a disk that cannot take one says so."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.lightning import checkpoint_io
from sdp_lightning.lightning.checkpoint_digest import DigestWriter, prove_whole
from sdp_lightning.lightning.checkpoint_io import AtomicCheckpointIO

CONTENT: dict[str, Any] = {
    "state_dict": {"a": torch.arange(1.0, 65.0), "b": torch.arange(9).reshape(3, 3)},
    "text": "naïve",
    "numbers": [1, 2.5, None, True],
}
LABEL = b"sdp-lightning sha256 "


def save(path: Path, content: dict[str, Any] = CONTENT) -> Path:
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def save_without_digest(path: Path) -> Path:
    """As earlier versions of this package did."""
    torch.save(CONTENT, path)
    return path


def load(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


# The digest ---------------------------------------------------------------------------------------


def test_the_file_is_an_archive_that_torch_and_zip_read_and_its_comment_is_the_digest(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "a.ckpt")
    moved = Path(shutil.move(path, tmp_path / "elsewhere.pt"))
    for mmap in (False, True):
        assert same(torch.load(moved, weights_only=True, mmap=mmap), CONTENT)
    assert same(load(moved), CONTENT)
    with zipfile.ZipFile(moved) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    assert comment.startswith(LABEL)
    archive_alone = moved.read_bytes().removesuffix(comment)[:-2] + b"\0\0"
    assert hashlib.sha256(archive_alone).hexdigest().encode() == comment.removeprefix(LABEL)


def test_large_and_small_writes_give_the_digest_of_what_was_written(tmp_path: Path) -> None:
    rest = {"large": torch.randn(200_000), "tiny": [torch.ones(1) for _ in range(9)]}
    assert same(load(save(tmp_path / "a.ckpt", CONTENT | rest))["large"], rest["large"])


def test_a_file_of_which_torch_would_read_memory_that_is_not_set_is_damaged(tmp_path: Path) -> None:
    """The bit that marks an entry as a folder; zip's check sums do not cover the directory."""
    for write in (save, save_without_digest):
        path = write(tmp_path / "a.ckpt")
        data = bytearray(path.read_bytes())
        entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
        data[entry + 38] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(sdp.CheckpointError, match=r"a\.ckpt.* torn or damaged"):
            load(path)


def test_a_checkpoint_without_a_digest_loads(tmp_path: Path) -> None:
    assert same(load(save_without_digest(tmp_path / "old.ckpt")), CONTENT)


def flip(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def flip_at_the_end(data: bytes, dice: random.Random) -> bytes:
    """In the directory of the archive or in its comment, where most fields are."""
    start = data.index(b"PK\x01\x02")
    return data[:start] + flip(data[start:], dice)


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def cut_within_the_comment(data: bytes, dice: random.Random) -> bytes:
    return data[: -dice.randrange(1, 100)]


def zero_a_sector(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data)) // 512 * 512
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


def swap_sectors(data: bytes, dice: random.Random) -> bytes:
    parts = [data[i : i + 512] for i in range(0, len(data), 512)]
    one, other = dice.sample(range(len(parts)), 2)
    parts[one], parts[other] = parts[other], parts[one]
    return b"".join(parts)


def append(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.randrange(1, 200))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip, flip_at_the_end, cut, cut_within_the_comment, zero_a_sector, swap_sectors, append),
)


def check_damages(write: Callable[[Path], Path], folder: Path, count: int) -> dict[str, int]:
    """Each of ``count`` damages of every kind is refused by name, or changes nothing."""
    path, whole = folder / "a.ckpt", save(folder / "whole.ckpt")
    data, outcomes = write(path).read_bytes(), {"refused": 0, "unharmed": 0}
    for damage in DAMAGES:
        dice = random.Random(damage.__name__)
        for number in range(count):
            path.write_bytes(damage(data, dice))
            try:
                found = load(path)
            except sdp.CheckpointError as error:
                assert str(path) in str(error) and f"Use {str(whole)!r}" in str(error)
                outcomes["refused"] += 1
                continue
            assert same(found, CONTENT), (damage.__name__, number)
            assert path.read_bytes() == data or write is save_without_digest, damage.__name__
            outcomes["unharmed"] += 1
    return outcomes


@pytest.mark.fault("corrupted data", "checkpoint")
def test_any_damage_is_refused_by_name(tmp_path: Path) -> None:
    outcomes = check_damages(save, tmp_path, 286)  # of each of 7 kinds: 2,002
    assert outcomes["refused"] > 1970, "equal sectors can be swapped or zeroed"


def test_any_damage_of_a_checkpoint_without_digest_is_refused_or_harmless(tmp_path: Path) -> None:
    outcomes = check_damages(save_without_digest, tmp_path, 60)
    assert outcomes["refused"] > 200 and outcomes["unharmed"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("write", [save, save_without_digest])
def test_a_hundred_thousand_damages(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert check_damages(write, tmp_path, 7_143)["refused"] > 40_000  # of 50,001 for each


@pytest.mark.parametrize("bit", range(8))
def test_every_byte_of_the_comment_counts(bit: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    data = path.read_bytes()
    for place in range(len(data) - len(LABEL) - 64 - 2, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(sdp.CheckpointError):
            prove_whole(path)


def test_a_disk_that_fails_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and cannot be read at 0
    with pytest.raises(sdp.CheckpointError, match=r"a\.ckpt.*cannot be read \(OSError"):
        load(path)


# Full disks ---------------------------------------------------------------------------------------


class FailingFile(io.RawIOBase):
    """A file on a disk that takes ``room`` bytes, then raises, takes less, or lies."""

    def __init__(self, file: BinaryIO, room: int, outcome: int | str) -> None:
        self._inner, self._room, self._outcome = file, room, outcome

    def write(self, data: Any) -> int:
        taken = bytes(data[: self._room])
        self._inner.write(taken)
        self._room -= len(taken)
        if len(taken) < len(data) and isinstance(self._outcome, int):
            raise OSError(self._outcome, os.strerror(self._outcome))
        return len(data) if self._outcome == "lies" else len(taken)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def flush(self) -> None:
        self._inner.flush()

    def fileno(self) -> int:
        return self._inner.fileno()


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int, outcome: int | str) -> None:
    @contextlib.contextmanager
    def filling(target: Path, *, durable: bool = False) -> Generator[BinaryIO]:
        with (
            atomic_file(target, durable=durable) as file,
            FailingFile(file, room, outcome) as failing,  # closed before what it writes to
        ):
            yield cast(BinaryIO, failing)

    monkeypatch.setattr(checkpoint_io, "atomic_file", filling)


@pytest.mark.fault("exception", "checkpoint")
@pytest.mark.parametrize("room", [0, 700, 2200])
@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (errno.ENOSPC, r"the disk is full\. It needs {} bytes, and the disk has [\d,]+ free"),
        (errno.EDQUOT, r"the quota of this user is used up\. It needs {} bytes"),
        (errno.EIO, r"Input/output error\. It needs {} bytes"),
        ("takes less", r"the disk took [\d,]+ of [\d,]+ bytes\. It needs {} bytes"),
        ("lies", r"the disk holds [\d,]+ of [\d,]+ bytes written\. It needs {} bytes"),
    ],
    ids=["full", "quota", "broken", "takes less", "lies"],
)
def test_a_disk_that_does_not_take_a_checkpoint_says_what_it_needs_and_keeps_the_one_before(
    room: int, outcome: int | str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "last.ckpt")
    needed = f"{path.stat().st_size:,}"
    fill_disk(monkeypatch, room, outcome)
    with pytest.raises(sdp.CheckpointError, match=reason.format(needed)) as caught:
        save(path, CONTENT | {"numbers": [2, 2.5, None, True]})
    assert str(path) in str(caught.value) and "untouched" in str(caught.value)
    assert same(load(path), CONTENT) and list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_system_is_said_with_the_bytes_that_are_needed(tmp_path: Path) -> None:
    path, result = save(tmp_path / "a.ckpt"), tmp_path / "result"
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                save(path, {"data": torch.ones(1_000_000)})
            except sdp.CheckpointError as error:
                result.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    said = result.read_text()
    assert "File too large. It needs 4,00" in said, said
    assert same(load(path), CONTENT) and sorted(tmp_path.iterdir()) == sorted([path, result])


def test_a_real_full_device_is_counted_to_the_end() -> None:
    with open("/dev/full", "wb", buffering=0) as file, DigestWriter(cast(BinaryIO, file)) as writer:
        torch.save(CONTENT, cast(Any, writer))
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
        size = io.BytesIO()
        torch.save(CONTENT, size)
        assert writer.num_bytes == len(size.getvalue()) + len(LABEL) + 64


def test_a_folder_that_cannot_be_made_is_one_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sdp.CheckpointError, match=r"file/a\.ckpt' was not written: .*/file'"):
        save(tmp_path / "file" / "a.ckpt")
