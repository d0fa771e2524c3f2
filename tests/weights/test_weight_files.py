"""Weights in files: complete, bounded, removed with their owner."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import FileTransport, WeightFolder
from sdp_lightning.weights.lora import LoRATransport
from sdp_lightning.weights.protocol import Instruction, LoadFolder, Target
from support.fake_servers import weights
from support.weight_transports import load, names_in, stage


def test_base_and_then_update_are_the_present_weights(tmp_path: Path):
    files = WeightFolder(tmp_path)
    assert files.folders == []
    base, num_bytes = files.write(weights(1.0, "a", "b"), full=True)
    assert num_bytes == 16 and files.folders == [base]
    for value in (2.0, 3.0):
        update, num_bytes = files.write(weights(value, "b"), full=False)
        assert num_bytes == 8
    assert files.folders == [base, update]
    assert load(base) == {"a": [1.0, 1.0], "b": [1.0, 1.0]} and load(update) == {"b": [3.0, 3.0]}
    files.close()
    files.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("exception", "stranger")
def test_folders_and_files_are_for_their_user_only_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        files, adapters = WeightFolder(tmp_path), LoRATransport(2.0, root=tmp_path)
        files.write(weights(1.0), full=True)
        files.write(weights(2.0), full=False)
        pair = [(f"m.lora_{kind}.default.weight", torch.ones(2, 2)) for kind in "AB"]
        adapters.stage([("base", torch.ones(2)), *pair], full=True)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) == 3 + 3 + 3 + 4  # locks; folders and their files
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"
    files.close()
    adapters.close()


def test_a_link_that_somebody_put_beside_the_weights_leads_nowhere(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "lock").write_text("kept")
    (tmp_path / "sdp-weights-1-abc").symlink_to(mine)
    trap = tmp_path / "sdp-weights-2-abc"
    trap.mkdir()
    (trap / "lock").symlink_to(mine / "lock")
    WeightFolder(tmp_path).close()
    assert (mine / "lock").read_text() == "kept" and trap.exists()


def test_a_new_start_forgets_the_updates_of_the_old_one(tmp_path: Path):
    files = WeightFolder(tmp_path)
    files.write(weights(1.0), full=True)
    files.write(weights(2.0), full=False)
    base, _ = files.write(weights(3.0), full=True)
    assert files.folders == [base] and load(base)["a"] == [3.0, 3.0]


def test_nothing_to_write_is_no_file(tmp_path: Path):
    files = WeightFolder(tmp_path)
    assert files.write([], full=False)[1] == 0
    assert files.folders == []


def test_a_tied_tensor_is_written_once_and_what_only_starts_there_is_not_tied(tmp_path: Path):
    whole = torch.arange(4.0)
    named = [("embedding", whole), ("head", whole), ("half", whole[:2].clone())]
    folder, num_bytes = WeightFolder(tmp_path).write(named, full=True)
    assert load(folder).keys() == {"embedding", "half"} and num_bytes == 24
    empty = [("none", torch.zeros(0)), ("nothing", torch.zeros(0))]
    folder, _ = WeightFolder(tmp_path).write(empty, full=True)
    assert load(folder).keys() == {"none", "nothing"}


def test_temporary_tensors_that_follow_one_another_are_not_taken_for_one(tmp_path: Path):
    made = ((f"w{n}", torch.full((256,), float(n))) for n in range(8))
    folder, _ = WeightFolder(tmp_path).write(made, full=True)
    assert {name: v[0] for name, v in load(folder).items()} == {f"w{n}": n for n in range(8)}


def test_what_a_reader_was_told_can_be_read_until_a_second_update_is_written(tmp_path: Path):
    files = WeightFolder(tmp_path, bucket_bytes=8)
    files.write(weights(0.0), full=True)
    files.write(weights(1.0, "a"), full=False)
    files.write(weights(2.0, "a"), full=False)
    told = files.folders
    seen: list[list[str]] = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b"):
            seen.append(names_in(files.path))
            assert files.folders == told and load(told[-1])["a"] == [2.0, 2.0]
            yield name, torch.full((2,), 3.0)

    files.write(made(), full=False)
    assert seen == [["base", "part", "update-2"]] * 2
    assert load(told[0])["a"] == [0.0, 0.0] and load(told[1])["a"] == [2.0, 2.0]
    assert names_in(files.path) == ["base", "update-2", "update-3"]
    assert [load(folder)["a"][0] for folder in files.folders] == [0.0, 3.0]
    files.write(weights(4.0, "a"), full=False)
    assert names_in(files.path) == ["base", "update-3", "update-4"] and not told[1].exists()


def test_a_reader_in_another_thread_always_finds_a_base_and_one_update_at_most(tmp_path: Path):
    files = WeightFolder(tmp_path)
    files.write(weights(0.0), full=True)
    ends = threading.Event()

    def write() -> None:
        for number in range(300):
            files.write(weights(float(number), "a"), full=number % 3 == 0)
        ends.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not ends.is_set():
            names = [folder.name.rstrip("0123456789") for folder in files.folders]
            assert names in (["base"], ["base", "update-"])
    finally:
        writer.join()


@pytest.mark.fault("exception", "publish")
def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path: Path):
    files = WeightFolder(tmp_path)
    base, _ = files.write(weights(1.0), full=True)
    files.write(weights(1.5), full=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(EngineError, match=r"cannot be written to .* bytes are free there"):
            files.write(weights(2.0), full=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(base)["a"] == [1.0, 1.0] and len(files.folders) == 2
    assert names_in(files.path) == ["base", "update-1"]


OWNER = """
import os, sys
from pathlib import Path
from sdp_lightning.weights.files import WeightFolder
print(WeightFolder(Path(sys.argv[1])).path.name, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def owner(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has a folder in ``root``; killed at the end."""
    command = [sys.executable, "-c", OWNER, str(root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, root / process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.fault("process killed", "teardown")
def test_a_folder_is_removed_once_its_owner_is_killed_and_not_before(tmp_path: Path):
    with owner(tmp_path) as (process, theirs):
        assert theirs.is_dir()
        # As another container sees it: the number is of no process there.
        renamed = theirs.rename(tmp_path / f"sdp-weights-{2**22 + 1}-elsewhere")
        mine = WeightFolder(tmp_path)
        assert renamed.is_dir()
        process.kill()
        process.wait()
        WeightFolder(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == [mine.path]


def test_a_folder_whose_number_another_process_has_by_now_is_removed_too(tmp_path: Path):
    gone = tmp_path / f"sdp-weights-{os.getppid()}-gone"
    gone.mkdir()
    (gone / "lock").touch()
    WeightFolder(tmp_path)
    assert not gone.exists()


def test_folders_of_others_and_those_without_a_lock_are_left(tmp_path: Path):
    unknown = tmp_path / f"sdp-weights-{2**22 + 1}-unknown"
    unknown.mkdir()
    kept = [unknown]
    if os.geteuid() == 0:
        kept.append(tmp_path / f"sdp-weights-{2**22 + 1}-other-user")
        kept[-1].mkdir()
        (kept[-1] / "lock").touch()
        os.chown(kept[-1], 65534, 65534)
    WeightFolder(tmp_path)
    assert all(folder.is_dir() for folder in kept)


def test_where_there_are_no_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = WeightFolder(tmp_path)
    second = WeightFolder(tmp_path)
    assert first.write(weights(1.0), full=True)[1] == 16 and second.path.is_dir()
    second.close()
    assert list(tmp_path.iterdir()) == [first.path]


def test_a_closed_folder_holds_no_file_open(tmp_path: Path):
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        files = WeightFolder(tmp_path)
        files.close()
        files.close()
    assert os.listdir("/proc/self/fd") == before


def test_shared_memory_is_where_weights_go():
    files = WeightFolder()
    assert files.path.parent == Path("/dev/shm")
    files.close()


# The transport ------------------------------------------------------------------------------------


def told(transport: FileTransport, *, whole: bool) -> list[dict[str, list[float]]]:
    """What a server is told to load, in order."""
    found: list[dict[str, list[float]]] = []

    async def tell(instruction: Instruction) -> None:
        assert isinstance(instruction, LoadFolder)
        found.append(load(Path(instruction.folder)))

    asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=whole))
    return found


def test_a_server_gets_what_is_new_and_another_one_gets_all(tmp_path: Path):
    transport = FileTransport(tmp_path)
    assert stage(transport, weights(1.0, "a", "b"), full=True) == 16
    base = {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert told(transport, whole=True) == [base]
    assert stage(transport, weights(2.0, "b"), full=False) == 8
    for _ in range(2):  # the same, until the next stage
        assert told(transport, whole=False) == [{"b": [2.0, 2.0]}]
        assert told(transport, whole=True) == [base, {"b": [2.0, 2.0]}]
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_without_weights_tells_nothing_and_forgets_nothing(tmp_path: Path):
    transport = FileTransport(tmp_path)
    stage(transport, weights(1.0, "a"), full=True)
    stage(transport, weights(2.0, "a"), full=False)
    assert stage(transport, [], full=False) == 0
    assert told(transport, whole=False) == []
    assert told(transport, whole=True) == [{"a": [1.0, 1.0]}, {"a": [2.0, 2.0]}]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.fault("corrupted data", "publish")
def test_weights_that_something_else_removed_are_named(tmp_path: Path, whole: bool):
    transport = FileTransport(tmp_path)
    stage(transport, weights(1.0), full=True)
    stage(transport, weights(2.0), full=False)
    [folder] = tmp_path.iterdir()
    shutil.rmtree(folder)
    with pytest.raises(EngineError, match=f"weights of {folder}/.* cannot be read: .*No such file"):
        told(transport, whole=whole)


def test_a_server_that_comes_back_gets_all_while_the_next_update_is_staged(tmp_path: Path):
    transport = FileTransport(tmp_path)
    stage(transport, weights(0.0, "a", "b"), full=True)
    stage(transport, weights(1.0, "b"), full=False)
    found: list[dict[str, list[float]]] = []

    async def tell(instruction: Instruction) -> None:
        assert isinstance(instruction, LoadFolder)
        if not found:  # between the two folders the trainer stages
            stage(transport, weights(2.0, "b"), full=False)
        found.append(load(Path(instruction.folder)))

    asyncio.run(transport.deliver(Target("http://one", 1, tell), whole=True))
    assert found == [{"a": [0.0, 0.0], "b": [0.0, 0.0]}, {"b": [1.0, 1.0]}]
    assert told(transport, whole=False) == [{"b": [2.0, 2.0]}]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(EngineError, match=f"no folder for weights can be made in {tmp_path}/no"):
        FileTransport(tmp_path / "no")


def test_a_close_under_a_write_leaves_nothing_whenever_it_comes(tmp_path: Path) -> None:
    delays = random.Random(0)
    for _ in range(300):
        files, begun = WeightFolder(tmp_path, bucket_bytes=8), threading.Event()

        def write(files: WeightFolder = files, begun: threading.Event = begun) -> None:
            begun.set()
            with contextlib.suppress(
                EngineError
            ):  # it may be closed before the last file is written
                files.write([(f"w{n}", torch.ones(2)) for n in range(3)], full=True)

        writer = threading.Thread(target=write)
        writer.start()
        begun.wait()
        time.sleep(delays.random() * 2e-3)
        files.close()
        writer.join()
        assert list(tmp_path.iterdir()) == []
