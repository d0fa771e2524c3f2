"""Weights in files: whole, bounded, each tensor once, removed with their owner."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from serving import weights

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import WeightFolder


def load(folder: Path) -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in load_file(folder / "model.safetensors").items()}


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


def test_a_reader_sees_the_old_file_or_the_new_one_never_half(tmp_path: Path):
    files = WeightFolder(tmp_path)
    folder, _ = files.write(weights(1.0), full=False)
    with (folder / "model.safetensors").open("rb") as old:
        files.write(weights(2.0), full=False)
        assert old.read() != (folder / "model.safetensors").read_bytes()
        assert os.fstat(old.fileno()).st_nlink == 0
    assert sorted(path.name for path in files.path.iterdir()) == ["update"]


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
    assert sorted(path.name for path in files.path.iterdir()) == ["base", "update"]


def test_folders_of_dead_processes_are_removed_and_others_are_not(tmp_path: Path):
    code = "import os, sys; os.mkdir(f'{sys.argv[1]}/sdp-weights-{os.getpid()}-dead')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in (f"sdp-weights-{os.getppid()}-alive", "sdp-weights-1-other-user", "sdp-weights-x"):
        (tmp_path / name).mkdir()
    first = WeightFolder(tmp_path)
    WeightFolder(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.endswith("dead") for name in names)
    assert {"sdp-weights-1-other-user", "sdp-weights-x", first.path.name} <= names
    assert len(names) == 5


def test_shared_memory_is_where_weights_go():
    files = WeightFolder()
    assert files.path.parent == Path("/dev/shm")
    files.close()
